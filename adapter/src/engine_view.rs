//! An engine as other processes see it: its segments, opened by name and checked.

use crate::arena::Arena;
use crate::error::AttachError;
use kvring_shm_abi::claims::Locks;
use kvring_shm_abi::engine_segment::{self, EngineSegment, OWNER_WORD, Places};
use kvring_shm_abi::epoch::Epoch;
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::{LOBBY_BYTES, Lobby};
use kvring_shm_abi::means::Means;
use kvring_shm_abi::segment::{self, Access, SegmentError, SegmentFile};
use kvring_shm_abi::superblock::{
    ARENA_TRAILER, Geometry, Identity, Kind, Mismatch, SUPERBLOCK_BYTES, Superblock,
};
use kvring_shm_abi::sync::Ordering;
use std::sync::Arc;

/// The engine's own segment, opened read-only and checked. `kvring status` reads it, and attaching begins with it.
///
/// # Example
/// ```
/// use kvring_adapter::{AttachError, EngineView};
/// use kvring_shm_abi::segment::EngineName;
///
/// # let (engine, options) = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/engine.rs"));
/// let name = EngineName::new(&options.engine)?;
/// assert!(EngineView::open(&name)?.serving(&name).is_ok());
/// let nobody = EngineView::open(&EngineName::new("nobody")?).err();
/// assert!(matches!(nobody, Some(AttachError::NoEngine(_))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct EngineView {
    /// The segment.
    pub segment: EngineSegment,
    /// Its superblock.
    pub identity: Identity,
    pub(crate) file: Arc<SegmentFile>,
}

impl EngineView {
    /// Opens the segment of the engine `name`, whether that is alive or not.
    pub fn open(name: &segment::EngineName) -> Result<EngineView, AttachError> {
        let segment = name.engine_segment();
        let file = match SegmentFile::open(&segment, Access::ReadOnly) {
            Err(SegmentError::NotFound(_)) => return Err(AttachError::NoEngine(name.to_string())),
            other => other?,
        };
        let mismatch = |mismatch| AttachError::Mismatch { segment: segment.clone(), mismatch };
        let length = file.len()?;
        if length < SUPERBLOCK_BYTES as u64 {
            return Err(mismatch(Mismatch::Incomplete));
        }
        // Read the superblock first: the segment's size follows from the geometry in it.
        let head = file.map(SUPERBLOCK_BYTES as u64, Access::ReadOnly)?;
        let identity = head.at::<Superblock>(0)?.read(Kind::Engine, length).map_err(mismatch)?;
        let expected = Places::of(&identity.geometry).bytes;
        if length < expected {
            return Err(mismatch(Mismatch::Size { expected, found: length }));
        }
        let mapping = Arc::new(file.map(expected, Access::ReadOnly)?);
        let segment = EngineSegment::new(mapping, &identity.geometry, identity.arena_id)?;
        Ok(EngineView { segment, identity, file: Arc::new(file) })
    }

    /// Is the engine that owns the segment alive?
    #[must_use]
    pub fn owner_lives(&self) -> bool {
        let locks = Locks::of(&self.file, engine_segment::LIFE_WORDS_AT);
        matches!(locks.life(&self.segment.life_words, OWNER_WORD), Life::Alive { .. })
    }

    /// How the engine came to its end; `None` if it is alive. `name` is the engine's name.
    #[must_use]
    pub fn end(&self, name: &segment::EngineName) -> Option<AttachError> {
        let name = name.to_string();
        if self.owner_lives() {
            None
        } else if self.segment.superblock().is_retired() {
            // The engine has ended cleanly, or been removed, since we opened it by name.
            Some(AttachError::NoEngine(name))
        } else if self.segment.info().stopped.load(Ordering::Relaxed) != 0 {
            Some(AttachError::Stopped(name))
        } else {
            Some(AttachError::Dead(name))
        }
    }

    /// The engine's incarnation if it serves, or else why it does not. `name` is the engine's name.
    pub fn serving(&self, name: &segment::EngineName) -> Result<u32, AttachError> {
        if let Some(end) = self.end(name) {
            return Err(end);
        }
        let incarnation = self.segment.epoch().incarnation();
        if self.segment.info().unhealthy.load(Ordering::Relaxed) != 0 {
            return Err(AttachError::Unhealthy(name.to_string()));
        }
        if !Epoch::serves(incarnation) {
            return Err(AttachError::Recovering(incarnation));
        }
        Ok(incarnation)
    }

    /// How the engine sleeps and how others notice its death, as it has published itself.
    #[must_use]
    pub fn means(&self) -> Means {
        Means::from_bits(self.segment.info().stand_ins.load(Ordering::Relaxed))
    }

    /// Opens the file of the lobby of this start of the engine, for the locks of clients whose kernel does not mark
    /// life words.
    pub fn open_lobby_file(&self, name: &segment::EngineName) -> Result<SegmentFile, AttachError> {
        open_lobby_file(name, &self.identity)
    }

    /// Opens the lobby of this start of the engine.
    pub fn open_lobby(&self, name: &segment::EngineName) -> Result<Lobby, AttachError> {
        let mapping = Arc::new(segment::open_shared(&name.lobby(), LOBBY_BYTES)?);
        let length = mapping.len() as u64;
        let lobby = Lobby::new(mapping)?;
        let block = lobby.superblock()?;
        check_sibling(block, Kind::Lobby, length, &name.lobby(), &self.identity)?;
        Ok(lobby)
    }
}

/// Opens the file of the lobby that belongs to the same start as the segment with the identity `engine`.
pub(crate) fn open_lobby_file(
    name: &segment::EngineName,
    engine: &Identity,
) -> Result<SegmentFile, AttachError> {
    let file = SegmentFile::open(&name.lobby(), Access::ReadWrite)?;
    let head = file.map(SUPERBLOCK_BYTES as u64, Access::ReadOnly)?;
    check_sibling(head.at(0)?, Kind::Lobby, file.len()?, &name.lobby(), engine)?;
    Ok(file)
}

fn check_sibling(
    block: &Superblock,
    kind: Kind,
    length: u64,
    segment: &str,
    engine: &Identity,
) -> Result<(), AttachError> {
    let identity = block
        .read(kind, length)
        .map_err(|mismatch| AttachError::Mismatch { segment: segment.to_owned(), mismatch })?;
    if identity.arena_id == engine.arena_id && identity.geometry == engine.geometry {
        Ok(())
    } else {
        Err(AttachError::OtherArena(segment.to_owned()))
    }
}

pub(crate) fn open_arena(name: &segment::EngineName, engine: &Identity) -> Result<Arena, AttachError> {
    let Geometry { arena_bytes, .. } = engine.geometry;
    let bytes = arena_bytes + ARENA_TRAILER;
    let file = SegmentFile::open(&name.arena(), Access::ReadWrite)?;
    let mapping = Arc::new(file.map(bytes, Access::ReadWrite)?);
    check_sibling(mapping.at(arena_bytes as usize)?, Kind::Arena, bytes, &name.arena(), engine)?;
    Ok(Arena::new(mapping, arena_bytes))
}
