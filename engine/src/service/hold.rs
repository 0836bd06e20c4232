//! What schedulers say that they hold, after they have found it by themselves or, after a restart, from before.

use super::Service;
use super::done::{Done, PIECE, refuse};
use crate::cache::{Held, Hold, HoldError};
use crate::stats::Stat;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{HOLD_MAX, Records, Status};
use kvring_shm_abi::payload::OutOfArea;

/// A message about chunks that a scheduler holds, and how far it has been done.
#[derive(Clone, Copy)]
pub(super) struct HoldRequest {
    hold: Hold,
    chunks: Records,
}

impl Service {
    pub(super) fn begin_hold(
        &mut self,
        entry: usize,
        session: u64,
        admission: u32,
        namespace: u32,
        first: u32,
        chunks: Records,
    ) -> Result<HoldRequest, Result<Done, OutOfArea>> {
        let Some(connection) = self.entries[entry].connection() else { return Err(Ok(Done::Answered)) };
        if connection.role != Role::Scheduler {
            return Err(Ok(refuse(Status::WrongRole)));
        }
        if chunks.count as usize > HOLD_MAX {
            return Err(Ok(Done::Answer(Status::TooMany, [HOLD_MAX as u64, 0, 0, 0])));
        }
        if self.registry.get(namespace).is_none() {
            return Err(Ok(refuse(Status::UnknownNamespace)));
        }
        connection.payload().check(chunks.offset, chunks.count as usize).map_err(Err)?;
        let hold = Hold::new(entry as u8, session, admission, namespace, first, chunks.count);
        Ok(HoldRequest { hold, chunks })
    }

    /// Goes on with a hold: pins its chunks, piece by piece, up to the first that is not there.
    pub(super) fn hold(&mut self, entry: usize, request: &mut HoldRequest) -> Result<Done, OutOfArea> {
        let HoldRequest { chunks, .. } = *request;
        loop {
            if self.cache.is_spent() {
                return Ok(Done::More);
            }
            let before = request.hold.held;
            let piece = PIECE.min((chunks.count - before) as usize);
            let Some(connection) = self.entries[entry].connection() else { return Ok(Done::Answered) };
            let words = &mut self.scratch.words[..piece];
            connection.payload().read(chunks.offset + before, words)?;
            failpoint::here(Place::Hold);
            let words = words.iter().map(|word| ChunkWord::from_bits(*word));
            let held = self.cache.hold_piece(&mut request.hold, words);
            self.stat(Stat::ChunksHeld, u64::from(request.hold.held - before));
            match held {
                Ok(Held::All) if request.hold.held < chunks.count => {}
                Ok(Held::Later) => return Ok(Done::More),
                Ok(Held::All | Held::Cut) => {
                    let held = request.hold.held;
                    self.stat(Stat::Holds, 1);
                    self.stat(Stat::HoldsCut, u64::from(held < chunks.count));
                    return Ok(Done::Answer(Status::Ok, [u64::from(held), 0, 0, 0]));
                }
                Err(HoldError::UnknownNamespace { .. }) => return Ok(refuse(Status::UnknownNamespace)),
                Err(HoldError::Gap { .. } | HoldError::NoSuchOwner { .. }) => {
                    self.stat(Stat::HoldsCut, 1);
                    return Ok(refuse(Status::Ok));
                }
            }
        }
    }
}
