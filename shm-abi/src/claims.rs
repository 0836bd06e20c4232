//! Claims on life words, by either of two ways in which others learn of a death.
//!
//! *With robust lists* the kernel marks a word when its owner dies (`life`). *Without* them (gVisor, seccomp: `probe`)
//! a **file lock** stands in: the owner of a word also holds a lock on one byte of the segment's file, at the word's own
//! offset, which ends with the process. Such a word says so, with a bit that no TID has. So everybody can see which of the
//! two tells of this owner's death, and processes with robust lists and processes without them can share an engine.
//!
//! Nobody is woken when a lock ends. Other processes look at it now and then ([`Locks`]) and **mark the word themselves**, as
//! the kernel would have done; from then on everything is as usual. The engine looks at its clients' locks, and at its start
//! at those of a predecessor. A client cannot write into the engine's segment: its keeper looks at the engine's lock, and tells
//! its own process.
//!
//! **The order makes it safe.** An owner takes the lock, then claims the word; at the end it marks the word, then unlocks. So if
//! a word was read as alive *before* its lock was found free, its owner is dead, or has marked it itself since; and the
//! mark is a compare-and-exchange from the value that was read. Where the kernel does not answer about a lock, its owner counts
//! as alive.
//!
//! **What a free lock proves.** A lock ends when the last descriptor of its open file is closed. When a process ends, its last
//! thread does that with the descriptor table (`exit_files`), which every thread gives up *after* it has left its address space
//! (`exit_mm`). So none of its threads will ever touch the arena again, and the slots that the process was writing may be freed
//! at the mark. A robust word proves less: it is marked while other threads of the process still run.
//! But a free lock does not prove that *nothing* writes: descriptors are closed one after the other, and a device may still
//! write through memory that was registered with it. Where devices write for a client, the slots that it was writing wait until
//! its process is gone for good, with either kind of notice (`lobby`, and the engine's `linger`). (A thread with a descriptor
//! table of its own, by `unshare`, is not covered; nothing here makes one.)
//!
//! **What it costs.** A death is noticed only when somebody looks, and only after the address space has been torn down: some
//! 18 ms per GiB that the process had touched, and a core dump first. If the one thread that holds the claims ends, nobody
//! notices while its process lives; but such a thread drops its claims, also when it panics. Where the kernel has neither
//! robust lists nor such locks, registering is an error.

use crate::failpoint::{self, Rule};
use crate::life::{ClaimError, LIFE_WORD_STRIDE, Life, LifeWord, RobustList};
use crate::lock::LockFile;
use crate::mapping::View;
use crate::means::DeathNotice;
use crate::probe;
use crate::segment::{SegmentError, SegmentFile};

/// The lock of the word of this index, in the file whose table of words begins at `words_at`: the word's first byte.
fn lock_at(words_at: usize, index: usize) -> u64 {
    (words_at + index * LIFE_WORD_STRIDE) as u64
}

/// The claims of one thread on the words of one table.
pub struct Claims(By);

enum By {
    Robust(RobustList),
    Lock(LockedClaims),
}

impl Claims {
    /// Prepares the calling thread to hold claims; it has none yet. The words begin at offset `words_at` of their segment.
    /// `open` opens that segment as a file of its own; it is called only where a file lock must stand in.
    ///
    /// # Errors
    /// There are neither robust lists nor file locks, or `open` failed.
    pub fn register(
        words: View<LifeWord>,
        words_at: usize,
        open: impl FnOnce() -> Result<SegmentFile, SegmentError>,
    ) -> Result<Claims, SegmentError> {
        if probe::has_robust_lists()
            && let Ok(list) = RobustList::register(words.clone())
        {
            return Ok(Claims(By::Robust(list)));
        }
        LockedClaims::new(words, words_at, open()?).map(|locked| Claims(By::Lock(locked)))
    }

    /// What tells others of this thread's death.
    #[must_use]
    pub fn notice(&self) -> DeathNotice {
        match &self.0 {
            By::Robust(_) => DeathNotice::RobustFutex,
            By::Lock(_) => DeathNotice::FileLock,
        }
    }

    /// Claims the word: from here on others learn of this thread's death.
    pub fn claim(&mut self, index: usize) -> Result<(), ClaimError> {
        match &mut self.0 {
            By::Robust(list) => list.claim(index),
            By::Lock(locked) => locked.claim(index),
        }
    }

    /// Claims a word that is unclaimed, or whose owner is marked dead, in one step: see [`RobustList::take_over`]. The caller
    /// has called [`Locks::mark_dead`] before, because a death that only a file lock tells leaves no mark.
    pub fn take_over(&mut self, index: usize) -> Result<(), ClaimError> {
        match &mut self.0 {
            By::Robust(list) => list.take_over(index),
            By::Lock(locked) => locked.take_over(index),
        }
    }

    /// Does the word still hold our claim? Peers can overwrite it.
    #[must_use]
    pub fn holds(&self, index: usize) -> bool {
        match &self.0 {
            By::Robust(list) => list.holds(index),
            By::Lock(locked) => locked.holds(index),
        }
    }

    /// Gives the word up as if this thread had died.
    pub fn release(&mut self, index: usize) {
        match &mut self.0 {
            By::Robust(list) => list.release(index),
            By::Lock(locked) => locked.release(index),
        }
    }
}

/// Claims that are held together with a file lock.
struct LockedClaims {
    words: View<LifeWord>,
    words_at: usize,
    held: Box<[bool]>,
    /// The value in our words.
    value: u32,
    file: LockFile,
}

impl LockedClaims {
    fn new(words: View<LifeWord>, words_at: usize, file: SegmentFile) -> Result<LockedClaims, SegmentError> {
        // The answer does not matter: this only shows whether the kernel knows such locks.
        file.is_byte_locked(lock_at(words_at, 0)).map_err(|errno| SegmentError::Os {
            name: file.name().to_owned(),
            what: "fcntl(F_OFD_GETLK), which must stand in for robust lists here",
            errno,
        })?;
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        let held = words.iter().map(|_| false).collect();
        Ok(LockedClaims {
            words,
            words_at,
            held,
            value: LifeWord::locked_value(tid),
            file: LockFile::new(file),
        })
    }

    fn claim(&mut self, index: usize) -> Result<(), ClaimError> {
        match self.life(index)? {
            (now, Life::Unclaimed) => self.claim_from(index, now),
            (_, taken) => Err(ClaimError::Taken(taken)),
        }
    }

    fn take_over(&mut self, index: usize) -> Result<(), ClaimError> {
        match self.life(index)? {
            (now, Life::Unclaimed | Life::Dead) => self.claim_from(index, now),
            (_, alive) => Err(ClaimError::Taken(alive)),
        }
    }

    fn life(&self, index: usize) -> Result<(u32, Life), ClaimError> {
        let count = self.words.len();
        let raw = self.words.get(index).map(LifeWord::raw).ok_or(ClaimError::NoSuchWord { index, count })?;
        Ok((raw, LifeWord::interpret(raw)))
    }

    /// Takes the lock first: a word that says that it has a lock, while nobody holds it, is a dead owner's.
    fn claim_from(&mut self, index: usize, now: u32) -> Result<(), ClaimError> {
        let at = lock_at(self.words_at, index);
        if !failpoint::broken(Rule::LifeLock)
            && !self.file.file().try_lock_byte(at).map_err(ClaimError::Lock)?
        {
            return Err(ClaimError::Locked);
        }
        let claimed = self.words[index].claim_as(now, self.value);
        match claimed {
            Ok(()) => self.held[index] = true,
            Err(_) => self.unlock(index),
        }
        claimed
    }

    fn holds(&self, index: usize) -> bool {
        self.held.get(index).is_some_and(|held| *held) && self.words[index].raw() == self.value
    }

    fn release(&mut self, index: usize) {
        if !self.held.get(index).is_some_and(|held| *held) {
            return;
        }
        self.held[index] = false;
        // Marks the word only if it is still ours, as a robust list does. It is marked before it is unlocked, so no other
        // process has to find the lock free first.
        self.words[index].mark_dead(self.value);
        self.unlock(index);
    }

    fn unlock(&self, index: usize) {
        // Unlocking a lock that was taken cannot fail; if it did, closing the file would end the lock.
        let _ = self.file.file().unlock_byte(lock_at(self.words_at, index));
    }
}

impl Drop for LockedClaims {
    fn drop(&mut self) {
        for index in 0..self.held.len() {
            self.release(index);
        }
    }
}

/// The locks of a table of life words, as every open file sees them but the one that holds them.
#[derive(Clone, Copy)]
pub struct Locks<'a> {
    file: &'a SegmentFile,
    words_at: usize,
}

impl<'a> Locks<'a> {
    /// The locks of the words that begin at `words_at` in this segment.
    #[must_use]
    pub fn of(file: &'a SegmentFile, words_at: usize) -> Locks<'a> {
        Locks { file, words_at }
    }

    /// Is the owner dead whose word held `raw` a moment ago, although the word is not marked? The kernel is asked (half a
    /// microsecond) only about words whose owner's death a file lock tells.
    #[must_use]
    pub fn owner_is_dead(&self, index: usize, raw: u32) -> bool {
        let by_lock = matches!(LifeWord::interpret(raw), Life::Alive { notice: DeathNotice::FileLock, .. });
        by_lock
            && !failpoint::broken(Rule::LooksAtLocks)
            && matches!(self.file.is_byte_locked(lock_at(self.words_at, index)), Ok(false))
    }

    /// What the word says, or `Dead` if the word is not marked yet and its file lock is free.
    #[must_use]
    pub fn life(&self, words: &View<LifeWord>, index: usize) -> Life {
        let Some(raw) = words.get(index).map(LifeWord::raw) else { return Life::Unclaimed };
        if self.owner_is_dead(index, raw) { Life::Dead } else { LifeWord::interpret(raw) }
    }

    /// Marks the words of dead owners whose death a file lock tells, as the kernel would have done, and wakes the sleepers on
    /// them. Returns how many it has marked. Every process that can write the words may call it.
    pub fn mark_dead(&self, words: &View<LifeWord>) -> usize {
        let marked = words.iter().enumerate().filter(|(index, word)| {
            let raw = word.raw();
            self.owner_is_dead(*index, raw) && word.mark_dead(raw)
        });
        marked.count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;
    use crate::segment::{Access, EngineName, unlink};
    use std::sync::Arc;

    const AT: usize = 4096;

    struct Table {
        words: View<LifeWord>,
        file: SegmentFile,
        name: String,
    }

    impl Drop for Table {
        fn drop(&mut self) {
            unlink(&self.name);
        }
    }

    #[allow(clippy::unwrap_used, reason = "clippy allows it in tests, but not in their helpers")]
    fn table(tag: &str) -> Table {
        let name = EngineName::new(&format!("t-{tag}-{}", std::process::id())).unwrap().lobby();
        let file = SegmentFile::create(&name, 8192).unwrap();
        file.allocate(0, 8192).unwrap();
        let mapping: Arc<Mapping> = Arc::new(file.map(8192, Access::ReadWrite).unwrap());
        Table { words: View::new(&mapping, AT, 4).unwrap(), file, name }
    }

    impl Table {
        #[allow(clippy::unwrap_used, reason = "clippy allows it in tests, but not in their helpers")]
        fn locked(&self) -> Claims {
            let file = self.file.reopen().unwrap();
            Claims(By::Lock(LockedClaims::new(self.words.clone(), AT, file).unwrap()))
        }

        fn locks(&self) -> Locks<'_> {
            Locks::of(&self.file, AT)
        }
    }

    /// Does what a death does: closes the descriptor, and nothing else.
    fn die(claims: Claims) {
        let By::Lock(locked) = claims.0 else { unreachable!("made with a lock") };
        let locked = core::mem::ManuallyDrop::new(locked);
        // SAFETY: the value that this is read from is never used or dropped again. `LockFile`'s own drop closes the descriptor:
        // closed behind its back, it would be closed once more in the next child, where another file may have its number.
        drop(unsafe { core::ptr::read(&raw const locked.file) });
    }

    #[test]
    fn a_word_says_that_a_lock_tells_of_its_owner_and_the_lock_does() {
        let table = table("claims");
        let mut claims = table.locked();
        claims.claim(1).unwrap();
        assert_eq!(claims.notice(), DeathNotice::FileLock);
        let Life::Alive { tid, notice } = table.words[1].life() else {
            panic!("{:?}", table.words[1].life())
        };
        assert_eq!(notice, DeathNotice::FileLock);
        assert_eq!(tid, rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs());
        assert!(table.words[1].is_alive());
        assert!(matches!(table.locks().life(&table.words, 1), Life::Alive { .. }));
        assert_eq!(table.locks().mark_dead(&table.words), 0, "a living owner keeps its word");
        die(claims);
        assert!(table.words[1].is_alive(), "nobody has looked yet");
        assert_eq!(table.locks().life(&table.words, 1), Life::Dead);
        assert_eq!(table.locks().mark_dead(&table.words), 1);
        assert_eq!(table.words[1].life(), Life::Dead);
        assert!(table.words[1].reset());
        assert_eq!(table.locks().mark_dead(&table.words), 0);
    }

    #[test]
    fn a_word_that_is_given_up_is_marked_and_its_lock_is_free() {
        let table = table("release");
        let mut claims = table.locked();
        claims.claim(0).unwrap();
        claims.claim(2).unwrap();
        assert!(matches!(claims.claim(0), Err(ClaimError::Taken(Life::Alive { .. }))));
        assert!(matches!(claims.take_over(0), Err(ClaimError::Taken(Life::Alive { .. }))));
        assert_eq!(claims.claim(4), Err(ClaimError::NoSuchWord { index: 4, count: 4 }));
        claims.release(0);
        assert_eq!(table.words[0].life(), Life::Dead);
        assert!(!table.file.is_byte_locked(lock_at(AT, 0)).unwrap());
        assert!(matches!(claims.claim(0), Err(ClaimError::Taken(Life::Dead))));
        drop(claims);
        assert_eq!(table.words[2].life(), Life::Dead);
        assert!(!table.file.is_byte_locked(lock_at(AT, 2)).unwrap());
    }

    #[test]
    fn with_and_without_robust_lists_claims_exclude_each_other_and_follow_one_another() {
        let table = table("mixed");
        let mut locked = table.locked();
        let mut robust = RobustList::register(table.words.clone()).unwrap();
        locked.claim(0).unwrap();
        robust.claim(1).unwrap();
        assert!(matches!(robust.claim(0), Err(ClaimError::Taken(Life::Alive { .. }))));
        assert!(matches!(robust.take_over(0), Err(ClaimError::Taken(Life::Alive { .. }))));
        assert!(matches!(locked.take_over(1), Err(ClaimError::Taken(Life::Alive { .. }))));
        assert_eq!(table.locks().mark_dead(&table.words), 0, "a robust owner needs no lock");
        die(locked);
        robust.release(1);
        assert_eq!(table.locks().mark_dead(&table.words), 1);
        robust.take_over(0).unwrap();
        let mut next = table.locked();
        next.take_over(1).unwrap();
        assert!(table.words[0].is_alive() && table.words[1].is_alive());
        assert_eq!(table.locks().mark_dead(&table.words), 0);
    }

    #[test]
    fn a_lock_that_somebody_holds_keeps_others_from_the_word_even_where_it_says_unclaimed() {
        let table = table("between");
        // Another process has taken the lock and not yet claimed the word.
        let other = table.file.reopen().unwrap();
        assert!(other.try_lock_byte(lock_at(AT, 3)).unwrap());
        let mut claims = table.locked();
        assert_eq!(claims.claim(3), Err(ClaimError::Locked));
        assert_eq!(table.words[3].life(), Life::Unclaimed);
        drop(other);
        claims.claim(3).unwrap();
    }

    #[test]
    fn a_word_that_claims_a_lock_and_has_none_is_a_dead_owners() {
        let table = table("bare");
        table.words[0].claim_as(0, LifeWord::locked_value(7)).unwrap();
        assert_eq!(table.locks().mark_dead(&table.words), 1);
        assert_eq!(table.words[0].life(), Life::Dead);
    }
}
