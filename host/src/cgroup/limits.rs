// SPDX-License-Identifier: Apache-2.0

//! Limits of the containers of a sandbox, and their sum.

/// CPU period in microseconds that quotas are added up in, the kernel's default.
pub const PERIOD_US: i64 = 100_000;

/// Limits, added up over the containers of a sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: Option<i64>,
    /// Microseconds of CPU per 100 ms.
    pub cpu_quota_us: Option<i64>,
    /// Relative CPU weight in v1's shares (2 to 262144).
    pub cpu_shares: Option<u64>,
}

impl Limits {
    /// The limits in an OCI `linux.resources` object.
    pub fn of(resources: &serde_json::Value) -> Self {
        let number = |path| resources.pointer(path).and_then(serde_json::Value::as_i64);
        let period = number("/cpu/period")
            .filter(|p| *p > 0)
            .unwrap_or(PERIOD_US);
        let quota = number("/cpu/quota").filter(|q| *q > 0);
        Self {
            memory: number("/memory/limit").filter(|m| *m > 0),
            cpu_quota_us: quota
                .and_then(|q| q.checked_mul(PERIOD_US))
                .map(|q| q / period),
            cpu_shares: number("/cpu/shares")
                .filter(|s| *s > 0)
                .map(i64::cast_unsigned),
        }
    }

    /// These limits, and where there is none, those of `others`.
    pub fn or(&self, others: &Self) -> Self {
        Self {
            memory: self.memory.or(others.memory),
            cpu_quota_us: self.cpu_quota_us.or(others.cpu_quota_us),
            cpu_shares: self.cpu_shares.or(others.cpu_shares),
        }
    }

    /// What a sandbox needs for containers with these limits: a limit only where every one has
    /// it, or the one without would starve.
    pub fn sum(all: &[Self]) -> Self {
        let total = |get: fn(&Self) -> Option<i64>| {
            all.iter()
                .map(get)
                .try_fold(0i64, |sum, x| x.map(|x| sum.saturating_add(x)))
        };
        if all.is_empty() {
            return Self::default();
        }
        let shares = all.iter().filter_map(|l| l.cpu_shares).sum::<u64>();
        Self {
            memory: total(|l| l.memory),
            cpu_quota_us: total(|l| l.cpu_quota_us),
            cpu_shares: (shares > 0).then_some(shares.clamp(2, 262_144)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_sandbox_is_limited_only_when_every_container_is() {
        let limits = |memory, quota, shares| {
            Limits::of(
                &json!({"memory": {"limit": memory}, "cpu": {"quota": quota, "period": 50_000, "shares": shares}}),
            )
        };
        let a = limits(100, 25_000, 512);
        let b = limits(50, 10_000, 512);
        let free = limits(-1, -1, 2);
        assert_eq!(
            Limits::sum(&[a, b]),
            Limits {
                memory: Some(150),
                cpu_quota_us: Some(70_000),
                cpu_shares: Some(1024)
            }
        );
        assert_eq!(
            Limits::sum(&[a, free]),
            Limits {
                memory: None,
                cpu_quota_us: None,
                cpu_shares: Some(514)
            }
        );
        assert_eq!(Limits::sum(&[]), Limits::default());
    }
}
