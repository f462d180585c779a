// SPDX-License-Identifier: Apache-2.0

//! Labels and annotations, as upstream has them (its `api/v1beta1/sandbox_types.go` and
//! `extensions/api/v1beta1`).

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

/// Label of a Pod, a Service's selector and a volume claim: [`name_hash`] of the Sandbox.
pub const SANDBOX_NAME_HASH: &str = "agents.x-k8s.io/sandbox-name-hash";
/// Label of a Pod, in the selector of its Sandbox's Service: [`name_digest`] of the Sandbox. Names
/// with the same [`SANDBOX_NAME_HASH`] are found in a second, and others' traffic is led by it.
pub const SANDBOX_NAME_DIGEST: &str = "kiln.dev/sandbox-name-digest";
/// Label of a Pod of a pool or a claim, in the selector of its template's NetworkPolicy:
/// [`name_digest`] of the template.
pub const TEMPLATE_NAME_DIGEST: &str = "kiln.dev/sandbox-template-digest";
/// Annotation of a Sandbox: the name of its Pod.
pub const POD_NAME: &str = "agents.x-k8s.io/pod-name";
/// Label of a pool's Sandbox: [`name_hash`] of the pool. It goes when a claim adopts it.
pub const WARM_POOL: &str = "agents.x-k8s.io/warm-pool-sandbox";
/// Label of a template, of the Sandboxes made from it and of their Pods: [`name_hash`] of the
/// template.
pub const TEMPLATE_REF_HASH: &str = "agents.x-k8s.io/sandbox-template-ref-hash";
/// Label of a pool's Sandbox: hash of what its template said when it was made.
pub const TEMPLATE_HASH: &str = "agents.x-k8s.io/sandbox-template-hash";
/// Annotation of a Sandbox: the name of its template.
pub const TEMPLATE_REF: &str = "agents.x-k8s.io/sandbox-template-ref";
/// Label of a claimed Sandbox and its Pod: the claim's uid.
pub const CLAIM_UID: &str = "agents.x-k8s.io/claim-uid";
/// Annotation of a claimed Sandbox: the claim's name. It tells people whose a Sandbox was that has
/// come back without its owner; nothing is given away by it.
pub const CLAIM_NAME: &str = "kiln.dev/claim-name";
/// Label of a claimed Sandbox: [`WARM`] or [`COLD`].
pub const LAUNCH_TYPE: &str = "agents.x-k8s.io/launch-type";
/// [`LAUNCH_TYPE`] of a Sandbox that a pool had ready.
pub const WARM: &str = "warm";
/// [`LAUNCH_TYPE`] of a Sandbox that was made for its claim.
pub const COLD: &str = "cold";
/// Label of a claim or Sandbox: who made it.
pub const CREATED_BY: &str = "agents.x-k8s.io/created-by";
/// Whom upstream knows in [`CREATED_BY`]; on Pods and in metrics all others are `unknown`.
pub const CREATORS: [&str; 3] = ["go-client", "python-client", "controller"];
/// Label of a Pod or volume claim without an owner: `true` lets a Sandbox adopt it.
pub const ADOPTABLE: &str = "agents.x-k8s.io/adoptable";
/// Annotation of a Pod: which of its labels come from its Sandbox, separated by commas.
pub const PROPAGATED_LABELS: &str = "agents.x-k8s.io/propagated-labels";
/// Annotation of a Pod: which of its annotations come from its Sandbox, separated by commas.
pub const PROPAGATED_ANNOTATIONS: &str = "agents.x-k8s.io/propagated-annotations";
/// Annotation of a Sandbox, or of its Pod template: what is kept when it is suspended. `snapshot`
/// keeps memory if nothing stands against it; `snapshot-required` does not suspend without.
pub const ON_SUSPEND: &str = "kiln.dev/on-suspend";
/// Annotation of a Sandbox's Pod: name of the PodSnapshot that it is to be restored from. It gives
/// no right to one.
pub const RESTORE: &str = "kiln.dev/restore-snapshot";
/// Annotation of a Sandbox's Pod: digest of the Pod template that it was made from.
pub const POD_SPEC_DIGEST: &str = "kiln.dev/pod-spec-digest";
/// Annotation of a Sandbox's Pod: why the memory of the Pod before it is lost, as `REASON: message`.
pub const MEMORY_LOST: &str = "kiln.dev/memory-lost";
/// Annotation of a Pod template: name of the PodSnapshot that a client wants restored.
pub const SNAPSHOT_NAME: &str = "podsnapshot.gke.io/ps-name";
/// Annotation of a PodSnapshot: name of the Pod that it was taken of.
pub const ORIGIN_POD: &str = "podsnapshot.gke.io/origin-pod";
/// Category of the kind PodSnapshot if it is Kiln's.
pub const SNAPSHOT_CATEGORY: &str = "kiln-snapshots";
/// Finalizer of a PodSnapshot: its files are on a node.
pub const SNAPSHOT_FILES: &str = "kiln.dev/snapshot-files";
/// Annotation of a SandboxNode: its agent is to take away what it has installed on the node.
pub const REMOVE: &str = "kiln.dev/remove";
/// Condition of a SandboxNode: whether what Pods of the class need is on the node.
pub const INSTALLED: &str = "Installed";
/// Reason of [`INSTALLED`]: it was taken away.
pub const REMOVED: &str = "Removed";
/// Reason of [`INSTALLED`]: it is to be taken away when the Pods have ended that need it.
pub const IN_USE: &str = "InUse";
/// Reason of [`INSTALLED`]: it could not be taken away.
pub const REMOVE_FAILED: &str = "RemoveFailed";
/// Condition of a SandboxNode: whether containerd has the handler of the class, and all that is
/// behind it is there.
pub const HANDLER_SERVED: &str = "HandlerServed";
/// Annotation of a claim: the Sandbox of a pool that it has. Early versions had it as a label.
pub const ASSIGNED_SANDBOX: &str = "agents.x-k8s.io/sandbox-name";
/// Annotation of a claim: when its client asked, in RFC 3339 with nanoseconds.
pub const CLIENT_REQUESTED_AT: &str = "agents.x-k8s.io/client-first-requested-at";
/// Annotation of a claim: when an admission webhook saw it first, in the same form.
pub const WEBHOOK_OBSERVED_AT: &str = "agents.x-k8s.io/webhook-first-observed-at";
/// Annotation of a claim: when the controller saw it first.
pub const CONTROLLER_OBSERVED_AT: &str = "agents.x-k8s.io/controller-first-observed-at";
/// Annotation of a claim: when it was ready for the first time.
pub const CLAIM_READY_AT: &str = "agents.x-k8s.io/claim-first-ready-at";
/// Annotation of an object: a W3C trace context as JSON, handed on from claim to Pod.
pub const TRACE_CONTEXT: &str = "opentelemetry.io/trace-context";
/// Annotation of a pool's Pod, which cluster-autoscaler may evict while nobody has claimed it.
pub const SAFE_TO_EVICT: &str = "cluster-autoscaler.kubernetes.io/safe-to-evict";

/// The hash by which upstream puts names into labels: FNV-1a of 32 bits as 8 hexadecimal digits.
#[must_use]
pub fn name_hash(name: &str) -> String {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("{hash:08x}")
}

/// A hash of a name that no other name has: the first 160 bits of its SHA-256, as 40 hexadecimal
/// digits, which is short enough for a label's value.
#[must_use]
pub fn name_digest(name: &str) -> String {
    let digest = Sha256::digest(name.as_bytes());
    digest[..20].iter().fold(String::new(), |mut text, byte| {
        // Writing into a string cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_hash_have_two_digests() {
        let (one, other) = ("agent-jen08m1", "agent-znis702");
        assert_eq!(name_hash(one), name_hash(other));
        assert_ne!(name_digest(one), name_digest(other));
        // FIPS 180-4, "abc".
        assert_eq!(
            name_digest("abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a3"
        );
    }

    #[test]
    fn names_hash_as_fnv_1a_has_it() {
        // Test vectors of draft-eastlake-fnv, appendix C.
        for (name, hash) in [("", "811c9dc5"), ("a", "e40c292c"), ("foobar", "bf9cf968")] {
            assert_eq!(name_hash(name), hash);
        }
    }
}
