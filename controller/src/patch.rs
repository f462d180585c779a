// SPDX-License-Identifier: Apache-2.0

//! JSON merge patches (RFC 7386) from what there is and what there should be.
//!
//! Status and metadata are patched this way: each object's status has one writer, and a patch of
//! what differs costs the apiserver less than an apply of all of it.

use serde::Serialize;
use serde_json::{Map, Value, json};

/// The patch that makes `new` of `old`, or `None` where they are the same.
pub(crate) fn diff(old: &Value, new: &Value) -> Option<Value> {
    if old == new {
        return None;
    }
    let (Value::Object(old), Value::Object(new)) = (old, new) else {
        return Some(new.clone());
    };
    let mut patch = Map::new();
    for (key, new) in new {
        if let Some(change) = diff(old.get(key).unwrap_or(&Value::Null), new) {
            patch.insert(key.clone(), change);
        }
    }
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    Some(Value::Object(patch))
}

/// The patch of a status, or `None` where it stays as it is.
pub(crate) fn status<T: Serialize>(
    old: Option<&T>,
    new: &T,
) -> Result<Option<Value>, serde_json::Error> {
    let old = match old {
        Some(old) => serde_json::to_value(old)?,
        None => json!({}),
    };
    let new = serde_json::to_value(new)?;
    Ok(diff(&old, &new).map(|patch| json!({ "status": patch })))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As RFC 7386 section 2 defines it.
    fn apply(target: &Value, patch: &Value) -> Value {
        let Value::Object(patch) = patch else {
            return patch.clone();
        };
        let mut result = target.as_object().cloned().unwrap_or_default();
        for (key, change) in patch {
            if change.is_null() {
                result.remove(key);
            } else {
                let old = result.get(key).cloned().unwrap_or(Value::Null);
                result.insert(key.clone(), apply(&old, change));
            }
        }
        Value::Object(result)
    }

    #[test]
    fn a_patch_makes_the_new_of_the_old() {
        let values = [
            json!({}),
            json!({"a": 1}),
            json!({"a": {"b": 1, "c": [1, 2]}}),
            json!({"a": {"c": [1]}, "d": {"e": {"f": "g"}}}),
            json!({"d": {"e": {}}}),
        ];
        for old in &values {
            for new in &values {
                match diff(old, new) {
                    Some(patch) => assert_eq!(&apply(old, &patch), new, "{old} {new} {patch}"),
                    None => assert_eq!(old, new),
                }
            }
        }
    }
}
