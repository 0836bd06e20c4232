//! What the engine is to know of a client for which devices write: see `kvring_shm_abi::lobby` and the engine's `linger`.

use crate::engine_view::open_lobby_file;
use kvring_shm_abi::lobby::{DmaOwner, Lobby, dma_lock_at};
use kvring_shm_abi::mapping::Mapping;
use kvring_shm_abi::process::ProcessIdentity;
use kvring_shm_abi::segment::{Access, EngineName};
use kvring_shm_abi::superblock::Identity;

/// Under one lock, so that no claim is missed: whoever comes second, the registration or the claim, finds the other.
#[derive(Default)]
pub(crate) struct Dma {
    registered: bool,
    /// The entry that is claimed.
    entry: Option<Claimed>,
    /// Holds its lock; see [`hold_lock`].
    lock: Option<Mapping>,
}

struct Claimed {
    name: EngineName,
    engine: Identity,
    lobby: Lobby,
    entry: usize,
}

impl Dma {
    /// Devices will write: the entry that is claimed, and each later one, says so.
    pub(crate) fn register(&mut self) {
        if !self.registered {
            self.registered = true;
            self.tell();
        }
    }

    /// Keeper: an entry has been claimed.
    pub(crate) fn claimed(&mut self, name: &EngineName, engine: &Identity, lobby: &Lobby, entry: usize) {
        self.entry = Some(Claimed { name: name.clone(), engine: *engine, lobby: lobby.clone(), entry });
        if self.registered {
            self.tell();
        }
    }

    /// Keeper: it is about to be given up, after the last copy into its arena has ended. `is_ours`: nobody has overwritten
    /// the claim, so what the entry says is ours to take back.
    pub(crate) fn given_up(&mut self, is_ours: bool) {
        if let Some(claimed) = self.entry.take().filter(|_| is_ours) {
            claimed.lobby.entries[claimed.entry].withdraw_dma();
        }
        self.lock = None;
    }

    fn tell(&mut self) {
        let Some(claimed) = &self.entry else { return };
        self.lock = hold_lock(claimed);
        let owner = DmaOwner { process: ProcessIdentity::own(), locked: self.lock.is_some() };
        claimed.lobby.entries[claimed.entry].register_dma(&owner);
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        // Without `given_up` nobody has waited for the last copy: held to the end of the process.
        core::mem::forget(self.lock.take());
    }
}

/// A file lock for engines of another PID namespace, held by a mapping: no descriptor leads to it any more, so it ends with
/// the address space, no child of a fork inherits it, and Linux lets go of it after all that descriptors led to (see the
/// engine's `linger`). `None` where there is none to be had; then such an engine never frees what a death left.
fn hold_lock(claimed: &Claimed) -> Option<Mapping> {
    let file = open_lobby_file(&claimed.name, &claimed.engine).ok()?;
    let locked = file.try_lock_byte(dma_lock_at(claimed.entry)).ok()?;
    let mapping = file.map(1, Access::ReadOnly).ok()?;
    locked.then_some(mapping)
}
