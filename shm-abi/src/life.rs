//! Life words: robust futexes, which the kernel marks when their owner dies, however it dies.
//!
//! A word holds `TID | WAITERS` while its owner lives. When the owner thread dies, before its address space is torn
//! down, the kernel sets `OWNER_DIED` and wakes one sleeper. It wakes one only if the WAITERS bit is set, so a claim always
//! sets it. **The word is the claim**: `list_op_pending` → CAS 0 → `TID | WAITERS` → link → clear pending, so that a death
//! between any two of these steps is noticed as well. Only the engine turns a dead word back into 0, after it has reclaimed
//! everything of its owner's.
//!
//! A robust list belongs to one thread, and finds each word at *node address + one fixed offset*. So the nodes have the same
//! stride as the words; they lie in private memory, where no peer can break the chain.
//!
//! Where the kernel has no robust lists, the word itself says that a *file lock* tells of its owner's death: see `claims`.

use crate::abi;
use crate::futex;
use crate::mapping::{Pad, Shared, View};
use crate::means::DeathNotice;
use crate::sync::{AtomicU32, Ordering, fence};
use core::marker::PhantomData;
use core::ptr::null_mut;

abi! {
    const WAITERS: u32 = libc::FUTEX_WAITERS;

    const OWNER_DIED: u32 = libc::FUTEX_OWNER_DIED;

    const TID_MASK: u32 = libc::FUTEX_TID_MASK;

    /// Set in a word that the kernel will never mark, because a file lock tells of its owner's death. It is a bit of the TID's
    /// field that no TID has (TIDs end at 2²²), so [`LifeWord::is_alive`], which only asks whether that field is 0, is right
    /// for both kinds of words.
    const FILE_LOCK: u32 = 1 << 29;

    /// Bytes between life words in a table, and between the list's nodes.
    pub const LIFE_WORD_STRIDE: usize = 64;

    /// A life word on a line of its own.
    #[repr(C, align(64))]
    pub struct LifeWord {
        word: AtomicU32,
        _pad: Pad<60>,
    }
}
const _: () = assert!(FILE_LOCK & TID_MASK != 0 && FILE_LOCK > 1 << 22);

// SAFETY: an atomic and padding.
unsafe impl Shared for LifeWord {}

#[cfg(not(loom))]
const _: () = assert!(size_of::<LifeWord>() == LIFE_WORD_STRIDE);

/// What a life word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Nobody has claimed it.
    Unclaimed,
    /// Its owner lives, as far as the word says.
    Alive {
        /// Thread id in the owner's PID namespace: for logs, it never identifies a life.
        tid: u32,
        /// What tells of the owner's death. With a file lock the owner may be dead and the word not marked yet: see
        /// [`Locks`](crate::claims::Locks).
        notice: DeathNotice,
    },
    /// Its owner is dead; the engine has not reclaimed it yet.
    Dead,
}

impl Life {
    /// For messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Life::Unclaimed => "unclaimed",
            Life::Alive { .. } => "claimed by a thread that lives",
            Life::Dead => "claimed by a thread that is dead",
        }
    }
}

impl LifeWord {
    /// What it says now.
    #[inline]
    #[must_use]
    pub fn life(&self) -> Life {
        // SYNC POINT: Acquire; pairs with the Release of a claim and of `reset`, and with the kernel's mark, which is
        // a full barrier.
        Self::interpret(self.word.load(Ordering::Acquire))
    }

    /// Does its owner live? The same answer as [`LifeWord::life`], in a load and a comparison: for a hot path.
    #[inline]
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // A TID from 1 to TID_MASK and no mark: the mark is the next bit above.
        let value = self.word.load(Ordering::Acquire) & (OWNER_DIED | TID_MASK);
        value.wrapping_sub(1) < TID_MASK
    }

    /// What `value` says.
    #[must_use]
    pub fn interpret(value: u32) -> Life {
        if value == 0 {
            Life::Unclaimed
        } else if value & OWNER_DIED != 0 || value & TID_MASK == 0 {
            Life::Dead
        } else {
            let notice =
                if value & FILE_LOCK == 0 { DeathNotice::RobustFutex } else { DeathNotice::FileLock };
            Life::Alive { tid: value & TID_MASK & !FILE_LOCK, notice }
        }
    }

    /// The value of a word whose owner is the thread `tid`, with a file lock to tell of its death.
    pub(crate) fn locked_value(tid: u32) -> u32 {
        WAITERS | FILE_LOCK | (tid & TID_MASK)
    }

    /// Claims the word by storing `value`, if it still holds `from`.
    pub(crate) fn claim_as(&self, from: u32, value: u32) -> Result<(), ClaimError> {
        // SYNC POINT: AcqRel; Acquire pairs with `reset`'s Release and the kernel's mark, Release with `life`'s Acquire.
        let claimed = self.word.compare_exchange(from, value, Ordering::AcqRel, Ordering::Acquire);
        claimed.map(|_| ()).map_err(|found| ClaimError::Taken(LifeWord::interpret(found)))
    }

    /// Marks the word as the kernel does, if it still holds `from`, and wakes all sleepers. Returns whether it did.
    pub fn mark_dead(&self, from: u32) -> bool {
        // SYNC POINT: Release; pairs with `life`'s Acquire. The kernel's own mark looks the same.
        let dead = OWNER_DIED | WAITERS;
        let marked = self.word.compare_exchange(from, dead, Ordering::Release, Ordering::Relaxed).is_ok();
        if marked {
            futex::wake_all(&self.word);
        }
        marked
    }

    /// The raw value, for a sleep: `(word.futex(), word.raw())`.
    #[inline]
    #[must_use]
    pub fn raw(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    /// The futex word. A sleeper that wakes and finds it dead has to wake the others, because the kernel wakes only one.
    #[must_use]
    pub fn futex(&self) -> &AtomicU32 {
        &self.word
    }

    /// Called by the engine when it has reclaimed everything of the dead owner's: the word may be claimed again. Does nothing
    /// and returns false if the word is not dead.
    pub fn reset(&self) -> bool {
        let value = self.raw();
        // SYNC POINT: Release; pairs with the Acquire of the next claim's CAS.
        Self::interpret(value) == Life::Dead
            && self.word.compare_exchange(value, 0, Ordering::Release, Ordering::Relaxed).is_ok()
    }
}

/// The kernel's `struct robust_list`.
#[repr(C)]
struct Node {
    next: *mut Node,
}

/// A node at the stride of the words.
#[repr(C, align(64))]
struct PaddedNode {
    node: Node,
    linked: bool,
}

const _: () = assert!(size_of::<PaddedNode>() == LIFE_WORD_STRIDE);

/// The kernel's `struct robust_list_head`.
#[repr(C)]
struct Head {
    list: Node,
    futex_offset: libc::c_long,
    list_op_pending: *mut Node,
}

/// The robust list of the thread that made it: its claims on the words of one table.
///
/// Neither `Send` nor `Sync`: the kernel ties it to the thread.
pub struct RobustList {
    head: Box<Head>,
    nodes: Box<[PaddedNode]>,
    words: View<LifeWord>,
    tid: u32,
    _one_thread: PhantomData<*mut ()>,
}

/// Why a word could not be claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// It has an owner, who lives, or is dead and not yet reclaimed.
    #[error("expected an unclaimed life word, found one that is {}", .0.as_str())]
    Taken(Life),
    /// No such word in the table.
    #[error("expected an index below {count}, got {index}")]
    NoSuchWord {
        /// The index.
        index: usize,
        /// Words in the table.
        count: usize,
    },
    /// It is unclaimed, but its file lock is held: its last owner is about to unlock it, or its next one is about to claim it.
    #[error("the file lock of an unclaimed life word is held")]
    Locked,
    /// Its file lock could not be asked for.
    #[error("the file lock of a life word: {0}")]
    Lock(nix::errno::Errno),
}

impl RobustList {
    /// Registers an empty list over `words` for the calling thread. It replaces the one that libc registered: the
    /// thread must not lock robust `pthread` mutexes (nothing in Rust's standard library does).
    ///
    /// # Errors
    /// Where the kernel or a sandbox has no `set_robust_list`.
    pub fn register(words: View<LifeWord>) -> std::io::Result<RobustList> {
        let nodes: Box<[PaddedNode]> =
            words.iter().map(|_| PaddedNode { node: Node { next: null_mut() }, linked: false }).collect();
        let offset = (words.as_ptr() as isize).wrapping_sub(nodes.as_ptr() as isize);
        let mut head = Box::new(Head {
            list: Node { next: null_mut() },
            futex_offset: offset as libc::c_long,
            list_op_pending: null_mut(),
        });
        head.list.next = &raw mut head.list;
        // SAFETY: the head stays at its address until `drop` has replaced it, and the kernel only reads it when this
        // thread dies.
        let done = unsafe { libc::syscall(libc::SYS_set_robust_list, &raw const *head, size_of::<Head>()) };
        if done != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        Ok(RobustList { head, nodes, words, tid, _one_thread: PhantomData })
    }

    /// Claims the word: from here on the kernel marks it at this thread's death.
    pub fn claim(&mut self, index: usize) -> Result<(), ClaimError> {
        let now = self.raw(index)?;
        // Somebody else's word must never be our pending operation, not even for a moment: its owner may have our TID in
        // another PID namespace, and if we died here the kernel would mark that living owner's word.
        if now != 0 { Err(ClaimError::Taken(LifeWord::interpret(now))) } else { self.claim_from(index, 0) }
    }

    /// Claims a word that is unclaimed or whose owner is dead, in one step: the word never looks unclaimed between its two
    /// owners. Only for a caller that has a right to the word, as an engine has to its dead predecessor's words.
    pub fn take_over(&mut self, index: usize) -> Result<(), ClaimError> {
        let now = self.raw(index)?;
        match LifeWord::interpret(now) {
            Life::Dead | Life::Unclaimed => self.claim_from(index, now),
            alive @ Life::Alive { .. } => Err(ClaimError::Taken(alive)),
        }
    }

    fn raw(&self, index: usize) -> Result<u32, ClaimError> {
        let count = self.words.len();
        self.words.get(index).map(LifeWord::raw).ok_or(ClaimError::NoSuchWord { index, count })
    }

    fn claim_from(&mut self, index: usize, now: u32) -> Result<(), ClaimError> {
        let node: *mut Node = &raw mut self.nodes[index].node;
        self.set_pending(node);
        let claimed = self.words[index].claim_as(now, self.tid | WAITERS);
        if claimed.is_ok() {
            // SAFETY: `node` is one of our nodes; head and nodes form a circular list that only this thread changes.
            unsafe { (*node).next = self.head.list.next };
            // The node is linked after its own `next` is set: at a node that leads nowhere the kernel would stop, and then
            // not look at the pending one either.
            compiler_fence();
            self.head.list.next = node;
            self.nodes[index].linked = true;
        }
        self.set_pending(null_mut());
        claimed
    }

    /// Does the word still hold our claim? Peers can overwrite it.
    #[must_use]
    pub fn holds(&self, index: usize) -> bool {
        self.nodes.get(index).is_some_and(|node| node.linked) && self.words[index].raw() == self.tid | WAITERS
    }

    /// Gives the word up as if this thread had died: marks it dead and wakes its sleepers. The engine reclaims and resets.
    pub fn release(&mut self, index: usize) {
        if !self.nodes.get(index).is_some_and(|node| node.linked) {
            return;
        }
        let node: *mut Node = &raw mut self.nodes[index].node;
        self.set_pending(node);
        self.unlink(node);
        self.nodes[index].linked = false;
        let word = &self.words[index].word;
        // Only a word that is still ours: a peer may have overwritten it, and the engine have given it to somebody else.
        // SYNC POINT: Release; pairs with `life`'s Acquire. The kernel's own mark looks the same.
        let ours = self.tid | WAITERS;
        let _ = word.compare_exchange(ours, OWNER_DIED | WAITERS, Ordering::Release, Ordering::Relaxed);
        // Before the wake: once it is marked, the word may be claimed by a thread that has our TID in its PID namespace.
        self.set_pending(null_mut());
        futex::wake_all(&self.words[index].word);
    }

    fn unlink(&mut self, node: *mut Node) {
        let mut at: *mut Node = &raw mut self.head.list;
        let end = at;
        // SAFETY: the list is circular, made of our own head and nodes, and changed by this thread alone.
        unsafe {
            while (*at).next != end {
                if (*at).next == node {
                    (*at).next = (*node).next;
                    return;
                }
                at = (*at).next;
            }
        }
    }

    fn set_pending(&mut self, node: *mut Node) {
        // Volatile, between compiler fences: the kernel reads it at any instruction of this thread, and the order
        // "pending, word, link, not pending" is the protocol. One thread: no hardware ordering is needed.
        compiler_fence();
        // SAFETY: a field of our own box.
        unsafe { core::ptr::write_volatile(&raw mut self.head.list_op_pending, node) };
        compiler_fence();
    }
}

#[cfg(not(loom))]
fn compiler_fence() {
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
}
#[cfg(loom)]
fn compiler_fence() {}

impl Drop for RobustList {
    fn drop(&mut self) {
        // Gives up what is still claimed, then makes the kernel forget the list: its memory is freed now, and the thread may
        // live on.
        for index in 0..self.nodes.len() {
            self.release(index);
        }
        fence(Ordering::SeqCst);
        // SAFETY: a null head is an empty list.
        unsafe { libc::syscall(libc::SYS_set_robust_list, null_mut::<Head>(), size_of::<Head>()) };
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::futex::Deadline;
    use crate::mapping::Mapping;
    use std::sync::Arc;
    use std::time::Duration;

    #[allow(clippy::unwrap_used, reason = "clippy allows it in tests, but not in their helpers")]
    fn words(n: usize) -> View<LifeWord> {
        View::new(&Arc::new(Mapping::private(4096)), 0, n).unwrap()
    }

    #[test]
    fn a_thread_that_ends_while_it_holds_a_word_is_noticed_by_a_sleeper() {
        let table = words(4);
        let theirs = table.clone();
        let owner = std::thread::spawn(move || {
            let mut list = RobustList::register(theirs).unwrap();
            list.claim(2).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            // The thread dies without dropping the list, so that it stays registered.
            std::mem::forget(list);
        });
        while table[2].life() == Life::Unclaimed {
            std::thread::yield_now();
        }
        // This sleeps for ever if the kernel does not mark the word, or wakes nobody.
        while table[2].life() != Life::Dead {
            let raw = table[2].raw();
            if LifeWord::interpret(raw) == Life::Dead {
                break;
            }
            futex::wait_any(&[(table[2].futex(), raw)], Deadline::NEVER);
        }
        owner.join().unwrap();
        assert!(table[2].reset());
        assert_eq!(table[2].life(), Life::Unclaimed);
        assert_eq!(table[1].life(), Life::Unclaimed);
    }

    #[test]
    fn a_word_has_one_owner_and_only_a_dead_one_is_reset() {
        let table = words(3);
        let mut list = RobustList::register(table.clone()).unwrap();
        list.claim(0).unwrap();
        assert!(matches!(list.claim(0), Err(ClaimError::Taken(Life::Alive { .. }))));
        assert!(!table[0].reset(), "a living owner keeps its word");
        assert_eq!(list.claim(3), Err(ClaimError::NoSuchWord { index: 3, count: 3 }));
        list.claim(1).unwrap();
        list.claim(2).unwrap();
        list.release(1);
        assert_eq!(table[1].life(), Life::Dead);
        assert!(matches!(list.claim(1), Err(ClaimError::Taken(Life::Dead))));
        assert!(table[1].reset());
        list.claim(1).unwrap();
        drop(list);
        for word in table.iter() {
            assert_eq!(word.life(), Life::Dead);
        }
    }

    #[test]
    fn a_dead_word_is_taken_over_a_living_one_is_not() {
        let table = words(2);
        let theirs = table.clone();
        std::thread::spawn(move || {
            let mut list = RobustList::register(theirs).unwrap();
            list.claim(0).unwrap();
            std::mem::forget(list);
        })
        .join()
        .unwrap();
        // Linux marks the word before the thread can be joined; nothing here relies on it.
        while table[0].life() != Life::Dead {
            std::thread::yield_now();
        }
        let mut list = RobustList::register(table.clone()).unwrap();
        list.take_over(0).unwrap();
        list.take_over(1).unwrap();
        assert!(table.iter().all(LifeWord::is_alive));
        assert!(matches!(list.take_over(0), Err(ClaimError::Taken(Life::Alive { .. }))));
        drop(list);
        assert_eq!(table[0].life(), Life::Dead);
    }

    #[test]
    fn a_quick_look_says_the_same_as_a_long_one() {
        let table = words(1);
        for value in
            [0, 1, TID_MASK, WAITERS, WAITERS | 7, OWNER_DIED, OWNER_DIED | 7, OWNER_DIED | WAITERS, u32::MAX]
                .into_iter()
                .chain([
                    FILE_LOCK,
                    LifeWord::locked_value(1),
                    LifeWord::locked_value(TID_MASK),
                    OWNER_DIED | FILE_LOCK,
                ])
        {
            table[0].word.store(value, Ordering::Relaxed);
            let long = matches!(LifeWord::interpret(value), Life::Alive { .. });
            assert_eq!(table[0].is_alive(), long, "{value:#x}");
        }
    }

    #[test]
    fn dying_between_claim_and_link_is_noticed() {
        // The state after the CAS and before the link: the word is set, only `list_op_pending` names it.
        let table = words(1);
        let theirs = table.clone();
        std::thread::spawn(move || {
            let mut list = RobustList::register(theirs).unwrap();
            let node: *mut Node = &raw mut list.nodes[0].node;
            list.set_pending(node);
            list.words[0].word.store(list.tid | WAITERS, Ordering::Release);
            std::mem::forget(list);
        })
        .join()
        .unwrap();
        assert_eq!(table[0].life(), Life::Dead);
    }
}
