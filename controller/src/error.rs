// SPDX-License-Identifier: Apache-2.0

use kiln_crds::keys;

use crate::cache::Key;

/// Why an object is not as it should be. The text is what a user reads in its condition.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The apiserver refused.
    #[error("{}", api_message(.0))]
    Api(#[source] Box<kube::Error>),
    #[error("{0}")]
    Encode(#[from] serde_json::Error),
    /// A Sandbox's Pod is not there, for this reason.
    #[error("{0}")]
    PodNotMade(#[source] Box<Error>),
    #[error(
        "multiple Pods ({0}) are controlled by this Sandbox; refusing to choose or create a Pod"
    )]
    MultiplePods(usize),
    #[error("{kind} \"{name}\" is owned by {owner}, not by sandbox \"{sandbox}\"")]
    OwnedByOther {
        kind: &'static str,
        name: String,
        owner: String,
        sandbox: String,
    },
    #[error(
        "cannot adopt unowned {kind} \"{name}\": missing required pool authorization label \
         (\"{}\") or sandbox tracking label (\"{}\")",
        keys::ADOPTABLE,
        keys::SANDBOX_NAME_HASH
    )]
    NotOurs { kind: &'static str, name: String },
    #[error(
        "cannot adopt service \"{name}\": ClusterIP is \"{cluster_ip}\" (expected \"None\", field \
         is immutable)"
    )]
    NotHeadless { name: String, cluster_ip: String },
    #[error(
        "refusing to update NetworkPolicy \"{name}\" as it is not controlled by SandboxTemplate \
         \"{template}\""
    )]
    ForeignPolicy { name: String, template: String },
    #[error("SandboxTemplate \"{0}\" not found")]
    TemplateNotFound(String),
    #[error("SandboxWarmPool \"{0}\" not found")]
    WarmPoolNotFound(String),
    #[error("SandboxWarmPool \"{pool}\" is of SandboxTemplate \"{other}\", not of \"{template}\"")]
    PoolOfOtherTemplate {
        pool: String,
        other: String,
        template: String,
    },
    /// No failure: the work is done again among the few that may hold large objects.
    #[error("too large to be kept")]
    Heavy,
    #[error("{0} is gone")]
    Gone(Key),
    #[error("adoption write conflict; the next pass retries from a converged view")]
    AdoptionConflict,
    #[error("sandbox {0} exists and does not belong to this claim")]
    NameTaken(Key),
    #[error(
        "sandbox \"{sandbox}\" was a claim's of this name and is owned by nobody, as after a restore \
         from a backup: an administrator gives it to this claim by its owner reference and the label \
         \"{}\", or deletes it for a new one",
        keys::CLAIM_UID
    )]
    Ownerless { sandbox: String },
    #[error("sandbox \"{sandbox}\" is not owned by claim \"{claim}\"")]
    SandboxNotOwned { sandbox: String, claim: String },
    #[error("invalid additionalPodMetadata: {0}")]
    Metadata(String),
    #[error("environment variable injection rejected: {0}")]
    EnvVars(String),
    #[error("{0}")]
    VolumeClaims(String),
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl From<kube::Error> for Error {
    fn from(e: kube::Error) -> Self {
        Self::Api(Box::new(e))
    }
}

impl Error {
    /// Whether trying again cannot help before somebody changes an object: then a change brings
    /// it back, and nothing else needs to.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::Api(_)
            | Self::Encode(_)
            | Self::AdoptionConflict
            | Self::Heavy
            | Self::Gone(_) => false,
            Self::PodNotMade(why) => why.is_final(),
            _ => true,
        }
    }

    /// Whether the apiserver says that an object cannot be as it is wanted. It is tried again all the
    /// same, because a policy may have said so.
    pub(crate) fn is_invalid(&self) -> bool {
        match self {
            Self::Api(e) => code(e) == Some(422),
            Self::PodNotMade(why) => why.is_invalid(),
            _ => false,
        }
    }
}

/// The apiserver's own message, without the wrapping.
fn api_message(e: &kube::Error) -> String {
    match e {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// HTTP status of an answer that was an error.
pub(crate) fn code(e: &kube::Error) -> Option<u16> {
    match e {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Whether an object is not there. An apiserver that has just started does not serve our kinds for
/// a moment, which says nothing of any object: it names none.
pub(crate) fn is_not_found(e: &kube::Error) -> bool {
    match e {
        kube::Error::Api(status) => status.code == 404 && status.message.ends_with("\" not found"),
        _ => false,
    }
}

pub(crate) fn is_conflict(e: &kube::Error) -> bool {
    code(e) == Some(409)
}

/// Whether nobody knows if a request has come to pass: there was no answer, or one that an
/// apiserver also gives when it has not heard from etcd in time.
pub(crate) fn is_unanswered(e: &kube::Error) -> bool {
    code(e).is_none_or(|code| code >= 500)
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn a_request_that_timed_out_in_the_apiserver_has_no_answer() {
        let answer = |code| kube::Error::Api(Status::failure("", "").with_code(code).boxed());
        for (code, expected) in [(409, false), (429, false), (500, true), (504, true)] {
            assert_eq!(is_unanswered(&answer(code)), expected, "{code}");
        }
        let lost = kube::Error::ReadEvents(std::io::ErrorKind::UnexpectedEof.into());
        assert!(is_unanswered(&lost));
    }
}
