// SPDX-License-Identifier: Apache-2.0

//! Quantities that are written as numbers. The Kubernetes API takes `cpu: 1` for `cpu: "1"`, and
//! what a custom resource keeps is what the user wrote.

use serde::{Deserialize, Deserializer, de::DeserializeOwned, de::Error};
use serde_json::Value;

/// Reads something with quantities in it, such as a Pod's spec.
///
/// # Errors
/// When it is not of the type even then.
pub(crate) fn deserialize<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let mut value = Value::deserialize(deserializer)?;
    quantities_to_text(&mut value);
    serde_json::from_value(value).map_err(D::Error::custom)
}

fn quantities_to_text(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(quantities_to_text),
        Value::Object(fields) => {
            for (name, field) in fields {
                match (name.as_str(), field) {
                    ("limits" | "requests" | "overhead", Value::Object(quantities)) => {
                        quantities.values_mut().for_each(number_to_text);
                    }
                    ("sizeLimit" | "divisor", field) => number_to_text(field),
                    (_, field) => quantities_to_text(field),
                }
            }
        }
        _ => {}
    }
}

fn number_to_text(value: &mut Value) {
    if let Value::Number(number) = value {
        *value = Value::String(number.to_string());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::PodTemplate;

    #[test]
    fn quantities_may_be_numbers() {
        let template: PodTemplate = serde_json::from_value(json!({"spec": {
            "containers": [{"name": "c", "resources": {"limits": {"cpu": 1, "memory": "1Gi"}}}],
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": 1048576}}],
            "terminationGracePeriodSeconds": 5,
        }}))
        .unwrap();
        let spec = serde_json::to_value(&template.spec).unwrap();
        assert_eq!(
            spec["containers"][0]["resources"]["limits"],
            json!({"cpu": "1", "memory": "1Gi"})
        );
        assert_eq!(spec["volumes"][0]["emptyDir"]["sizeLimit"], "1048576");
        assert_eq!(spec["terminationGracePeriodSeconds"], 5);
    }
}
