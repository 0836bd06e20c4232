//! How far a request has come with a piece of its work.

use kvring_shm_abi::message::{KEYS_MAX, Status};

/// Keys or records that are copied out together.
pub(super) const PIECE: usize = 512;

/// How a piece of a request ended, if not in a breach.
pub(super) enum Done {
    /// The request has ended, with these results.
    Answer(Status, [u64; 4]),
    /// The answer comes later, and other requests meanwhile.
    Later,
    /// The answer has been given.
    Answered,
    /// What is allowed is spent: it goes on with its client's next turn.
    More,
    /// The answer has been given; what its lease has beyond the first `keep` chunks is to be ended.
    Trim { session: u64, admission: u32, keep: u32 },
}

pub(super) const OK: Done = Done::Answer(Status::Ok, [0; 4]);

pub(super) fn refuse(status: Status) -> Done {
    Done::Answer(status, [0; 4])
}

pub(super) fn too_many() -> Done {
    Done::Answer(Status::TooMany, [KEYS_MAX as u64, 0, 0, 0])
}
