// SPDX-License-Identifier: Apache-2.0

//! How room for warm sandboxes is divided: by the controller between namespaces, and by a node's
//! agent between shapes.

use std::collections::BTreeMap;

/// Divides `room` among those who want some of it, max-min fair: nobody gets more than they want, and
/// who gets less than they want gets at least as much as anybody else, but for one, which goes to the
/// first by their order.
#[must_use]
pub fn divide<K: Ord + Clone>(wants: &BTreeMap<K, usize>, room: usize) -> BTreeMap<K, usize> {
    let mut by_size: Vec<(&K, usize)> = wants.iter().map(|(key, want)| (key, *want)).collect();
    // Of two that want the same, the first by their order comes last, where rounding favours it.
    by_size.sort_by(|(a, one), (b, other)| one.cmp(other).then_with(|| b.cmp(a)));
    let mut left = room;
    let mut shares = BTreeMap::new();
    for (index, (key, want)) in by_size.iter().enumerate() {
        let share = (*want).min(left / (by_size.len() - index));
        left -= share;
        shares.insert((*key).clone(), share);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divided(wants: &[usize], room: usize) -> Vec<usize> {
        let wants = wants.iter().copied().enumerate().collect();
        divide(&wants, room).into_values().collect()
    }

    #[test]
    fn who_wants_little_gets_it_and_the_rest_is_shared() {
        assert_eq!(divided(&[1, 2], 10), [1, 2]);
        assert_eq!(divided(&[1, usize::MAX, 5], 10), [1, 5, 4]);
        assert_eq!(divided(&[9, 9, 9], 16), [6, 5, 5]);
        assert_eq!(divided(&[9, 9, 9], 2), [1, 1, 0]);
        assert_eq!(divided(&[0, 3], 2), [0, 2]);
        assert_eq!(divided(&[], 2), [0; 0]);
    }

    #[test]
    fn any_room_is_used_up_and_shared_max_min_fair() {
        bolero::check!()
            .with_type::<(Vec<u8>, u16)>()
            .for_each(|(wants, room)| {
                let wants: Vec<usize> = wants.iter().map(|w| usize::from(*w)).collect();
                let room = usize::from(*room);
                let shares = divided(&wants, room);
                let total: usize = wants.iter().sum();
                assert_eq!(shares.iter().sum::<usize>(), total.min(room));
                let most = shares.iter().max().copied().unwrap_or_default();
                for (want, share) in wants.iter().zip(&shares) {
                    assert!(share <= want);
                    assert!(
                        share == want || share + 1 >= most,
                        "{wants:?} {room}: {shares:?}"
                    );
                }
            });
    }
}
