//! What a client's entry tells the engine if devices write for the client: see `kvring_shm_abi::lobby` and the engine's
//! `linger`.

use crate::engine_view::open_lobby_file;
use kvring_shm_abi::lobby::{DmaOwner, Lobby, dma_lock_at};
use kvring_shm_abi::mapping::Mapping;
use kvring_shm_abi::process::ProcessIdentity;
use kvring_shm_abi::segment::{Access, EngineName};
use kvring_shm_abi::superblock::Identity;

/// Both the registration and the claim are here, under one lock: whichever comes second finds the other, so no claim is
/// left without the declaration.
#[derive(Default)]
pub(crate) struct Dma {
    registered: bool,
    /// The claimed entry, while there is one.
    entry: Option<Claimed>,
    /// Holds the entry's file lock; see [`hold_lock`].
    lock: Option<Mapping>,
}

struct Claimed {
    name: EngineName,
    engine: Identity,
    lobby: Lobby,
    entry: usize,
}

impl Dma {
    /// Declares in the claimed entry, and in each later one, that devices write for this client.
    pub(crate) fn register(&mut self) {
        if !self.registered {
            self.registered = true;
            self.tell();
        }
    }

    /// Keeper: an entry has been claimed; declares there that devices write, if they do.
    pub(crate) fn claimed(&mut self, name: &EngineName, engine: &Identity, lobby: &Lobby, entry: usize) {
        self.entry = Some(Claimed { name: name.clone(), engine: *engine, lobby: lobby.clone(), entry });
        if self.registered {
            self.tell();
        }
    }

    /// Keeper: the entry is about to be given up, after the last copy into its arena has ended. `is_ours`: nobody has
    /// overwritten the claim, so the declaration in the entry is ours to take back.
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
        // If `given_up` was not called, nobody has waited for the last copy: keep the lock until the process ends.
        core::mem::forget(self.lock.take());
    }
}

/// Takes a file lock for engines of another PID namespace, and holds it by a mapping. No descriptor leads to the file
/// any more, so the lock ends with the address space, no child of a fork inherits it, and Linux releases it after
/// everything that descriptors led to (see the engine's `linger`). `None` if there is no such lock to be had; then such
/// an engine never frees the slots that this client was writing when it died.
fn hold_lock(claimed: &Claimed) -> Option<Mapping> {
    let file = open_lobby_file(&claimed.name, &claimed.engine).ok()?;
    let locked = file.try_lock_byte(dma_lock_at(claimed.entry)).ok()?;
    let mapping = file.map(1, Access::ReadOnly).ok()?;
    locked.then_some(mapping)
}
