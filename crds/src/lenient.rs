// SPDX-License-Identifier: Apache-2.0

//! What the Kubernetes API takes and the types here do not: a custom resource keeps what the user
//! wrote. Quantities may be numbers (`cpu: 1` for `cpu: "1"`), and times may be later than any that
//! can be reckoned with, in the last two days of the year 9999, which is how some write "never".

use jiff::{Timestamp, fmt::temporal::Pieces};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff};
use serde::{Deserialize, Deserializer, de::DeserializeOwned, de::Error};
use serde_json::Value;

/// The year of [`Timestamp::MAX`].
const LAST_YEAR: i16 = 9999;

/// Reads a time of RFC 3339. One that is too late becomes the last there is.
///
/// # Errors
/// When it is no time.
pub(crate) fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Time>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else {
        return Ok(None);
    };
    let time = text.parse().or_else(|e| {
        if is_too_late(&text) {
            Ok(Timestamp::MAX)
        } else {
            Err(e)
        }
    });
    time.map(|time| Some(Time(time))).map_err(D::Error::custom)
}

/// Whether a time that could not be read is one at all.
fn is_too_late(text: &str) -> bool {
    Pieces::parse(text).is_ok_and(|pieces| {
        let is_whole = pieces.time().is_some() && pieces.offset().is_some();
        is_whole && pieces.date().year() == LAST_YEAR
    })
}

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

    use super::*;
    use crate::{Lifecycle, PodTemplate, SandboxSpec};

    #[test]
    fn times_end_with_the_last_that_there_is() {
        let read = |text: &str| {
            let claims = serde_json::from_value::<Lifecycle>(json!({"shutdownTime": text}));
            let template = json!({"spec": {"containers": []}});
            let own = json!({"podTemplate": template, "shutdownTime": text});
            let own = serde_json::from_value::<SandboxSpec>(own).map(|spec| spec.shutdown_time);
            let claims = claims.map(|lifecycle| lifecycle.shutdown_time);
            assert_eq!(own.as_ref().ok(), claims.as_ref().ok());
            claims.map(|time| time.unwrap().0)
        };
        for text in [
            "9999-12-31T23:59:59Z",
            "9999-12-31T23:59:59.5-08:00",
            "9999-12-30T21:00:00-05:00",
        ] {
            assert_eq!(read(text).unwrap(), Timestamp::MAX, "{text}");
        }
        let early = "9999-12-30T21:59:59Z";
        assert_eq!(read(early).unwrap(), early.parse().unwrap());
        assert_eq!(
            read("2030-01-01T01:00:00+01:00").unwrap(),
            read("2030-01-01T00:00:00Z").unwrap()
        );
        for text in [
            "",
            "never",
            "9999-12-31",
            "9999-12-31T23:59:59",
            "9999-12-32T00:00:00Z",
            "10000-01-01T00:00:00Z",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        assert_eq!(
            serde_json::from_value::<Lifecycle>(json!({"shutdownTime": null})).unwrap(),
            Lifecycle::default()
        );
    }

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
