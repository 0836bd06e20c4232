//! How a piece of a request's work ended.

use kvring_shm_abi::message::{KEYS_MAX, Status};

/// Keys or records that are copied out together.
pub(super) const PIECE: usize = 512;

/// How a piece of a request ended, if not in a breach.
pub(super) enum Done {
    /// The request has ended, with these results.
    Answer(Status, [u64; 4]),
    /// The answer comes later; meanwhile other requests of the client are taken.
    Later,
    /// The answer has been given.
    Answered,
    /// The allowed work is spent: the request goes on when it is its client's turn again.
    More,
}

pub(super) const OK: Done = Done::Answer(Status::Ok, [0; 4]);

pub(super) fn refuse(status: Status) -> Done {
    Done::Answer(status, [0; 4])
}

pub(super) fn too_many() -> Done {
    Done::Answer(Status::TooMany, [KEYS_MAX as u64, 0, 0, 0])
}
