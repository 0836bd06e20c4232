//! Turns the engine's status codes into typed errors.

use crate::error::{CallError, RegisterError};
use kvring_shm_abi::message::{Completion, Disagreement, KEYS_MAX, Registration, Status};

/// The error that a completion amounts to, if it is one.
pub(crate) fn check(completion: &Completion) -> Result<(), CallError> {
    match completion.status {
        Status::Ok => Ok(()),
        Status::Busy => Err(CallError::Busy),
        Status::UnknownNamespace => Err(CallError::NotRegistered),
        Status::OutOfSpace => Err(CallError::OutOfSpace),
        Status::WrongRole => Err(CallError::Refused("not for this client's role")),
        Status::TooMany => {
            let limit = usize::try_from(completion.results[0]).unwrap_or(KEYS_MAX);
            Err(CallError::TooManyKeys { limit, got: limit.saturating_add(1) })
        }
        Status::Disagreement | Status::TooManyNamespaces | Status::TooManySizes | Status::ShardTooLarge => {
            Err(CallError::Refused("an answer that belongs to registrations"))
        }
    }
}

/// As [`check`], for the completion of a registration; its result is the namespace's id.
pub(crate) fn check_registration(
    completion: &Completion,
    record: &Registration,
) -> Result<u32, RegisterError> {
    let [first, expected, got, _] = completion.results;
    match completion.status {
        Status::Ok => u32::try_from(first)
            .map_err(|_| RegisterError::Call(CallError::Refused("a namespace id above 32 bits"))),
        Status::Disagreement => match Disagreement::from_number(first) {
            Some(what) => Err(RegisterError::Disagreement { what, expected, got }),
            None => Err(CallError::Refused("a disagreement about nothing that exists").into()),
        },
        Status::TooManyNamespaces => Err(RegisterError::TooManyNamespaces),
        Status::TooManySizes => Err(RegisterError::TooManySizes { most: first }),
        Status::ShardTooLarge => {
            Err(RegisterError::ShardTooLarge { shard_bytes: record.shard_bytes, largest: first })
        }
        _ => check(completion)
            .map_err(RegisterError::Call)
            .and(Err(CallError::Refused("an answer that means nothing").into())),
    }
}
