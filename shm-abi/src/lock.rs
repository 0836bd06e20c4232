//! An open file that holds locks for this process, and for no child of it.
//!
//! A lock of an open file (`F_OFD_SETLK`) ends with the file's last descriptor, and `fork` copies descriptors: a child that
//! lives on would keep its parent's locks, and the parent would look alive. So the child closes its copy at once, in a handler
//! that `fork` calls; the lock stays while the parent has its own descriptor. The handler does not reach a child made by a bare
//! `clone` or between the opening of a file and its entry here, nor more than [`FILES_MAX`] of these files in one process: in
//! these cases the parent's death is noticed only when the child has ended, too.

use crate::segment::SegmentFile;
use crate::sync::{AtomicU32, Ordering};
use core::mem::ManuallyDrop;
use std::sync::Once;

/// Open files that a child closes. A process has one for each of its clients.
const FILES_MAX: usize = 128;

const NONE: u32 = u32::MAX;

static OPEN: [AtomicU32; FILES_MAX] = [const { AtomicU32::new(NONE) }; FILES_MAX];
static REGISTER: Once = Once::new();

extern "C" fn in_child() {
    for place in &OPEN {
        // Relaxed: right after `fork` the child has one thread.
        let fd = place.swap(NONE, Ordering::Relaxed);
        if let Ok(fd) = i32::try_from(fd) {
            // SAFETY: the child's copy of a descriptor that nothing in the child uses: a `LockFile` made by the parent does not
            // close it in the child (see `LockFile::drop`).
            unsafe { libc::close(fd) };
        }
    }
}

/// An open file whose locks no child of this process holds: see the module.
pub(crate) struct LockFile {
    file: ManuallyDrop<SegmentFile>,
    place: Option<usize>,
    process: u32,
}

impl LockFile {
    /// Takes an open file that nobody else uses.
    pub(crate) fn new(file: SegmentFile) -> LockFile {
        REGISTER.call_once(|| {
            // SAFETY: the handler only touches atomics and closes descriptors. Registering it can only fail for lack of memory,
            // and then a child keeps its copies.
            unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        });
        let fd = file.raw_fd().unsigned_abs();
        let takes = |place: &AtomicU32| {
            place.compare_exchange(NONE, fd, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        };
        let place = OPEN.iter().position(takes);
        LockFile { file: ManuallyDrop::new(file), place, process: std::process::id() }
    }

    /// The open file.
    pub(crate) fn file(&self) -> &SegmentFile {
        &self.file
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // In a child the descriptor is closed already, and another file may have its number by now.
        if self.process != std::process::id() {
            return;
        }
        if let Some(place) = self.place {
            OPEN[place].store(NONE, Ordering::Relaxed);
        }
        // SAFETY: dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.file) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::{Access, EngineName, unlink};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    #[test]
    fn a_child_of_fork_does_not_hold_its_parents_locks() {
        let name = EngineName::new(&format!("t-lock-{}", std::process::id())).unwrap().lobby();
        let other = SegmentFile::create(&name, 4096).unwrap();
        let file = LockFile::new(SegmentFile::open(&name, Access::ReadWrite).unwrap());
        unlink(&name);
        assert!(file.file().try_lock_byte(7).unwrap());
        let (reader, writer) = nix::unistd::pipe().unwrap();
        // SAFETY: the child calls nothing but `read` and `_exit`.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                // The child lives until the parent closes the pipe.
                drop(writer);
                let _ = nix::unistd::read(&reader, &mut [0]);
                // SAFETY: it ends the child at once; no destructor and no exit handler of the parent's runs in it.
                unsafe { libc::_exit(0) };
            }
            ForkResult::Parent { child } => {
                drop(reader);
                assert!(other.is_byte_locked(7).unwrap(), "a fork takes nothing from the parent");
                // As in a death, the descriptor is closed and nothing is unlocked.
                drop(file);
                // This loop would not end if the child held the parent's lock.
                while other.is_byte_locked(7).unwrap() {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                drop(writer);
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            }
        }
    }
}
