// SPDX-License-Identifier: Apache-2.0

//! Quantities of Kubernetes (`apimachinery/pkg/api/resource`): `1500m`, `2Gi`, `1e3`.

/// Longest text that is read: more digits than any amount of memory has.
const LONGEST: usize = 32;

/// What `text` stands for, in thousandths and rounded up as Kubernetes does; `None` for what is no
/// quantity, is negative, or is beyond all sense.
pub(crate) fn milli(text: &str) -> Option<i64> {
    if text.len() > LONGEST {
        return None;
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, suffix) = text.split_at(end.unwrap_or(text.len()));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (times, over) = factor(suffix)?;
    let over = over.checked_mul(power(10, fraction.len())?)?;
    let top = digits.checked_mul(times)?.checked_mul(1_000)?;
    let rounded_up = top.checked_add(over - 1)? / over;
    i64::try_from(rounded_up).ok()
}

/// What a suffix multiplies by, and divides by.
fn factor(suffix: &str) -> Option<(i128, i128)> {
    let binary = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    if let Some(n) = binary.iter().position(|s| *s == suffix) {
        return Some((power(1_024, n + 1)?, 1));
    }
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (power(10, 3)?, 1),
        "M" => (power(10, 6)?, 1),
        "G" => (power(10, 9)?, 1),
        "T" => (power(10, 12)?, 1),
        "P" => (power(10, 15)?, 1),
        "E" => (power(10, 18)?, 1),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let factor = power(10, usize::try_from(exponent.unsigned_abs()).ok()?)?;
            if exponent < 0 {
                (1, factor)
            } else {
                (factor, 1)
            }
        }
    })
}

fn power(base: i128, exponent: usize) -> Option<i128> {
    base.checked_pow(u32::try_from(exponent).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("1", Some(1_000)),
            ("1500m", Some(1_500)),
            ("0.5", Some(500)),
            (".5", Some(500)),
            ("2.", Some(2_000)),
            ("+2", Some(2_000)),
            ("1Gi", Some(1_000 << 30)),
            ("1.5Ki", Some(1_536_000)),
            ("1k", Some(1_000_000)),
            ("1E", None),
            ("1e3", Some(1_000_000)),
            ("1E-3", Some(1)),
            ("1n", Some(1)),
            ("100u", Some(1)),
            ("0", Some(0)),
            ("", None),
            (".", None),
            ("-1", None),
            ("1.2.3", None),
            ("1GB", None),
            ("Gi", None),
            ("1e99", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(milli(text), expected, "{text}");
        }
    }

    #[test]
    fn any_text_is_a_quantity_or_none() {
        bolero::check!().for_each(|text: &[u8]| {
            if let Some(milli) = milli(&String::from_utf8_lossy(text)) {
                assert!(milli >= 0);
            }
        });
    }
}
