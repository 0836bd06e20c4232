//! Segments: files in POSIX shared memory, created, checked, allocated and mapped.
//!
//! A segment must have mode 0600 and belong to our own uid, or it is refused. Descriptors are close-on-exec, and a forked child
//! does not inherit mappings. Memory is allocated (`fallocate`) before it is touched, so that a full `/dev/shm` is an error and
//! never a SIGBUS. Nothing is ever truncated, zeroed in place or unlinked by a `Drop`.

mod error;
mod name;

pub use error::SegmentError;
pub use name::{BadName, EngineName, NAME_MAX};

use crate::failpoint::{self, Rule};
use crate::mapping::Mapping;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, Flock, FlockArg, OFlag};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags};
use nix::sys::stat::Mode;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// Where POSIX shared memory lives on Linux.
pub const SHM_DIR: &str = "/dev/shm";

/// The path of a segment's file.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    Path::new(SHM_DIR).join(name.trim_start_matches('/'))
}

/// How a segment is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A store through it is a SIGSEGV.
    ReadOnly,
    /// For loads and stores.
    ReadWrite,
}

/// An open segment.
#[derive(Debug)]
pub struct SegmentFile {
    fd: OwnedFd,
    name: String,
    /// The path of the name, kept so that [`SegmentFile::is_current`] allocates nothing.
    path: PathBuf,
}

/// Bytes that the shared-memory file system has left.
#[must_use]
pub fn available_bytes() -> u64 {
    nix::sys::statvfs::statvfs(SHM_DIR).map_or(0, |s| s.blocks_available() * s.fragment_size())
}

/// Why a segment that exists may not be opened: its owner or its mode. Both can be seen without opening it.
fn not_ours(name: &str) -> SegmentError {
    let path = format!("{SHM_DIR}/{}", name.trim_start_matches('/'));
    let (name, expected) = (name.to_owned(), nix::unistd::geteuid().as_raw());
    match nix::sys::stat::stat(path.as_str()) {
        Ok(stat) if stat.st_uid != expected => {
            SegmentError::WrongOwner { name, expected, found: stat.st_uid }
        }
        Ok(stat) if stat.st_mode & 0o777 != 0o600 => {
            SegmentError::WrongMode { name, found: stat.st_mode & 0o777 }
        }
        _ => SegmentError::Os { name, what: "shm_open", errno: Errno::EACCES },
    }
}

impl SegmentFile {
    fn os(&self, what: &'static str) -> impl FnOnce(Errno) -> SegmentError {
        let name = self.name.clone();
        move |errno| SegmentError::Os { name, what, errno }
    }

    /// Creates a new, sparse segment of `bytes` bytes; an existing name is an error.
    pub fn create(name: &str, bytes: u64) -> Result<SegmentFile, SegmentError> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let fd =
            nix::sys::mman::shm_open(name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map_err(
                |errno| match errno {
                    Errno::EEXIST => SegmentError::Exists(name.to_owned()),
                    errno => SegmentError::Os { name: name.to_owned(), what: "shm_open", errno },
                },
            )?;
        let file = SegmentFile { fd, name: name.to_owned(), path: path(name) };
        let sized = nix::unistd::ftruncate(&file.fd, i64::try_from(bytes).unwrap_or(i64::MAX));
        if let Err(errno) = sized {
            unlink(name);
            return Err(file.os("ftruncate")(errno));
        }
        Ok(file)
    }

    /// Opens an existing segment: ours, and nobody else's to read or write.
    pub fn open(name: &str, access: Access) -> Result<SegmentFile, SegmentError> {
        let flags = match access {
            Access::ReadOnly => OFlag::O_RDONLY,
            Access::ReadWrite => OFlag::O_RDWR,
        } | OFlag::O_CLOEXEC;
        let fd = nix::sys::mman::shm_open(name, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::ENOENT => SegmentError::NotFound(name.to_owned()),
            Errno::EACCES => not_ours(name),
            errno => SegmentError::Os { name: name.to_owned(), what: "shm_open", errno },
        })?;
        let file = SegmentFile { fd, name: name.to_owned(), path: path(name) };
        let stat = nix::sys::stat::fstat(&file.fd).map_err(file.os("fstat"))?;
        let expected = nix::unistd::geteuid().as_raw();
        if stat.st_uid != expected {
            return Err(SegmentError::WrongOwner { name: file.name, expected, found: stat.st_uid });
        }
        let found = stat.st_mode & 0o777;
        if found & 0o077 != 0 {
            return Err(SegmentError::WrongMode { name: file.name, found });
        }
        Ok(file)
    }

    /// The segment's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Creator: lengthens the segment. A creator makes a segment empty, allocates its memory, and only then lengthens it, so
    /// that a peer never maps a page without memory: even *reading* such a page is a SIGBUS while `/dev/shm` is full.
    pub fn grow(&self, bytes: u64) -> Result<(), SegmentError> {
        if self.len()? > bytes {
            // Never shorter: a peer that maps the end would get a SIGBUS.
            return Err(self.os("ftruncate to fewer bytes")(Errno::EINVAL));
        }
        nix::unistd::ftruncate(&self.fd, i64::try_from(bytes).unwrap_or(i64::MAX))
            .map_err(self.os("ftruncate"))
    }

    /// Its length in bytes.
    pub fn len(&self) -> Result<u64, SegmentError> {
        let stat = nix::sys::stat::fstat(&self.fd).map_err(self.os("fstat"))?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// Bytes that have memory.
    pub fn allocated_bytes(&self) -> Result<u64, SegmentError> {
        let stat = nix::sys::stat::fstat(&self.fd).map_err(self.os("fstat"))?;
        // Blocks are counted in units of 512 bytes, whatever the file system's own are.
        Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }

    /// Is its length zero (somebody is only just creating it)?
    pub fn is_empty(&self) -> Result<bool, SegmentError> {
        Ok(self.len()? == 0)
    }

    /// Allocates `bytes` bytes from `offset`, so that touching them can never fail.
    pub fn allocate(&self, offset: u64, bytes: u64) -> Result<(), SegmentError> {
        let (start, len) = (i64::try_from(offset), i64::try_from(bytes));
        let (Ok(start), Ok(len)) = (start, len) else { return Err(self.os("fallocate")(Errno::EFBIG)) };
        if failpoint::broken(Rule::Memory) {
            return Err(SegmentError::NoSpace { name: self.name.clone(), bytes, available: 0 });
        }
        loop {
            match nix::fcntl::fallocate(&self.fd, FallocateFlags::FALLOC_FL_KEEP_SIZE, start, len) {
                Ok(()) => return Ok(()),
                // After a signal tmpfs gives back what this call had allocated. So callers allocate much memory in small
                // pieces, or with signals blocked; else a periodic signal could keep this loop from ever ending.
                Err(Errno::EINTR) => {}
                Err(Errno::ENOSPC | Errno::ENOMEM) => {
                    let available = available_bytes();
                    return Err(SegmentError::NoSpace { name: self.name.clone(), bytes, available });
                }
                Err(errno) => return Err(self.os("fallocate")(errno)),
            }
        }
    }

    /// Makes allocated memory ready to use. `fallocate` leaves the clearing of each page to the first access
    /// (0.6–1 GB/s for a store into fresh memory, against 4–6 after it); this clears the pages now, through a mapping that is
    /// gone when it returns. It does not change the contents of pages that are in use already. `offset` is a multiple
    /// of the page size. A kernel before 5.14 cannot do it: that is an error, and costs only speed.
    pub fn populate(&self, offset: u64, bytes: u64) -> Result<(), SegmentError> {
        let (offset, len) = (i64::try_from(offset), usize::try_from(bytes).ok().and_then(NonZeroUsize::new));
        let (Ok(offset), Some(len)) = (offset, len) else { return Err(self.os("populate")(Errno::EINVAL)) };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base =
            unsafe { nix::sys::mman::mmap(None, len, protection, MapFlags::MAP_SHARED, &self.fd, offset) }
                .map_err(self.os("mmap"))?;
        // SAFETY: our own mapping; populating faults pages in without changing what is in them.
        let populated = unsafe { nix::sys::mman::madvise(base, len.get(), MmapAdvise::MADV_POPULATE_WRITE) };
        // SAFETY: mapped above; nothing refers to it.
        let unmapped = unsafe { nix::sys::mman::munmap(base, len.get()) };
        populated.map_err(self.os("madvise(MADV_POPULATE_WRITE)"))?;
        unmapped.map_err(self.os("munmap"))
    }

    /// Maps the first `bytes` bytes, which must be there.
    pub fn map(&self, bytes: u64, access: Access) -> Result<Mapping, SegmentError> {
        let found = self.len()?;
        let len = usize::try_from(bytes).ok().and_then(NonZeroUsize::new);
        let (Some(len), true) = (len, found >= bytes) else {
            return Err(SegmentError::TooShort { name: self.name.clone(), expected: bytes.max(1), found });
        };
        let writable = access == Access::ReadWrite;
        let protection =
            if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe { nix::sys::mman::mmap(None, len, protection, MapFlags::MAP_SHARED, &self.fd, 0) }
            .map_err(self.os("mmap"))?;
        dont_fork(base.cast(), len.get());
        // SAFETY: just mapped with this length and protection; only the `Mapping` unmaps it.
        Ok(unsafe { Mapping::from_mmap(base.cast(), len.get(), writable) })
    }

    /// Does the name still lead to this file? False only if it was unlinked or replaced: a file whose mode somebody has
    /// changed, or a name that cannot be looked at, is not another file.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let ours = nix::sys::stat::fstat(&self.fd).map(|stat| (stat.st_dev, stat.st_ino));
        match std::fs::symlink_metadata(&self.path) {
            Ok(named) => ours.is_ok_and(|ours| ours == (named.dev(), named.ino())),
            Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        }
    }

    /// Opens the same segment once more. The result is another open file, with locks of its own.
    pub fn reopen(&self) -> Result<SegmentFile, SegmentError> {
        let other = SegmentFile::open(&self.name, Access::ReadWrite)?;
        if other.same_file(self) { Ok(other) } else { Err(SegmentError::NotFound(self.name.clone())) }
    }

    fn same_file(&self, other: &SegmentFile) -> bool {
        let stat =
            |file: &SegmentFile| nix::sys::stat::fstat(&file.fd).map(|stat| (stat.st_dev, stat.st_ino));
        matches!((stat(self), stat(other)), (Ok(ours), Ok(theirs)) if ours == theirs)
    }

    /// Takes an exclusive lock on one byte, without waiting; false if another open file has it. The lock ends with this open
    /// file, that is, with its last descriptor in any process, so a forked child must close its copy. (`F_SETLK` will not do:
    /// closing *any* descriptor of the file would drop that lock.)
    pub fn try_lock_byte(&self, at: u64) -> nix::Result<bool> {
        match nix::fcntl::fcntl(&self.fd, FcntlArg::F_OFD_SETLK(&byte(at, libc::F_WRLCK))) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Unlocks one byte.
    pub fn unlock_byte(&self, at: u64) -> nix::Result<()> {
        nix::fcntl::fcntl(&self.fd, FcntlArg::F_OFD_SETLK(&byte(at, libc::F_UNLCK))).map(|_| ())
    }

    /// Does another open file hold a lock on this byte? The question changes nothing, and a file opened for reading only may
    /// ask it.
    pub fn is_byte_locked(&self, at: u64) -> nix::Result<bool> {
        let mut asked = byte(at, libc::F_WRLCK);
        nix::fcntl::fcntl(&self.fd, FcntlArg::F_OFD_GETLK(&mut asked))?;
        Ok(i32::from(asked.l_type) != libc::F_UNLCK)
    }

    /// The descriptor: a forked child closes it, although nothing is dropped there (`lock`).
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Takes an exclusive lock on the open file, without waiting; `None` if somebody else has it. It keeps two engines from
    /// *creating* segments at once. It does not tell whether an engine lives: the owner word does.
    pub fn try_lock(&self) -> Option<SegmentLock> {
        let fd = self.fd.as_fd().try_clone_to_owned().ok()?;
        Flock::lock(fd, FlockArg::LockExclusiveNonblock).ok().map(SegmentLock)
    }
}

/// One byte, for `fcntl`. Types of locks are small numbers, and a length of 0 would mean "to the end".
fn byte(at: u64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at as libc::off_t,
        l_len: 1,
        // Must be 0 for a lock of an open file.
        l_pid: 0,
    }
}

/// A lock on a whole open file; dropping it unlocks.
#[derive(Debug)]
pub struct SegmentLock(#[allow(dead_code, reason = "held for its Drop")] Flock<OwnedFd>);

/// Removes a name; processes that map the segment keep it. An unknown name is no error.
pub fn unlink(name: &str) {
    // The only other error is that the file is another user's, and then we must leave it.
    let _ = nix::sys::mman::shm_unlink(name);
}

/// Keeps the mapping from children of `fork`: a child must not pass for its parent.
fn dont_fork(base: NonNull<u8>, len: usize) {
    // SAFETY: our own mapping; DONTFORK changes nothing in this process.
    let advised = unsafe { nix::sys::mman::madvise(base.cast(), len, MmapAdvise::MADV_DONTFORK) };
    debug_assert!(advised.is_ok(), "madvise(MADV_DONTFORK): {advised:?}");
}

/// Creates a small segment with the crate `shared_memory`, fully allocated: the lobby and the channels.
pub fn create_shared(name: &str, bytes: usize) -> Result<Mapping, SegmentError> {
    let mut shmem =
        shared_memory::ShmemConf::new().os_id(name).size(bytes).create().map_err(|source| match source {
            shared_memory::ShmemError::MappingIdExists => SegmentError::Exists(name.to_owned()),
            error => SegmentError::Crate { name: name.to_owned(), error },
        })?;
    // As the owner its drop would unlink the name, even if a successor's segment had it by then.
    shmem.set_owner(false);
    // The crate only truncates: without this a full /dev/shm would be a SIGBUS at the first touch.
    let allocated =
        SegmentFile::open(name, Access::ReadWrite).and_then(|file| file.allocate(0, bytes as u64));
    if let Err(error) = allocated {
        unlink(name);
        return Err(error);
    }
    adopt(name, shmem)
}

/// Opens a small segment with the crate `shared_memory`, after checking owner, mode and size.
pub fn open_shared(name: &str, bytes: usize) -> Result<Mapping, SegmentError> {
    let file = SegmentFile::open(name, Access::ReadWrite)?;
    let found = file.len()?;
    if found < bytes as u64 {
        return Err(SegmentError::TooShort { name: name.to_owned(), expected: bytes as u64, found });
    }
    let mut shmem = shared_memory::ShmemConf::new()
        .os_id(name)
        .open()
        .map_err(|error| SegmentError::Crate { name: name.to_owned(), error })?;
    shmem.set_owner(false);
    if shmem.len() < bytes {
        let found = shmem.len() as u64;
        return Err(SegmentError::TooShort { name: name.to_owned(), expected: bytes as u64, found });
    }
    adopt(name, shmem)
}

fn adopt(name: &str, shmem: shared_memory::Shmem) -> Result<Mapping, SegmentError> {
    let mapping = Mapping::from_shmem(shmem).ok_or_else(|| SegmentError::Os {
        name: name.to_owned(),
        what: "mmap",
        errno: Errno::EFAULT,
    })?;
    dont_fork(mapping.base(), mapping.len());
    Ok(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(tag: &str) -> String {
        EngineName::new(&format!("t-{tag}-{}", std::process::id())).unwrap().engine_segment()
    }

    #[test]
    fn create_open_map_unlink() {
        let name = name("basic");
        let file = SegmentFile::create(&name, 8192).unwrap();
        assert!(matches!(SegmentFile::create(&name, 8192), Err(SegmentError::Exists(_))));
        file.allocate(0, 8192).unwrap();
        let other = SegmentFile::open(&name, Access::ReadOnly).unwrap();
        assert_eq!(other.map(8192, Access::ReadOnly).unwrap().len(), 8192);
        assert!(matches!(
            other.map(8193, Access::ReadOnly),
            Err(SegmentError::TooShort { expected: 8193, found: 8192, .. })
        ));
        assert!(other.is_current());
        unlink(&name);
        assert!(!other.is_current());
        assert!(matches!(SegmentFile::open(&name, Access::ReadOnly), Err(SegmentError::NotFound(_))));
    }

    #[test]
    fn a_name_leads_to_another_file_only_if_it_was_removed_or_replaced() {
        let name = name("current");
        let file = SegmentFile::create(&name, 4096).unwrap();
        nix::sys::stat::fchmod(&file.fd, Mode::from_bits_truncate(0o640)).unwrap();
        assert!(file.is_current(), "another mode is not another file");
        unlink(&name);
        assert!(!file.is_current());
        let other = SegmentFile::create(&name, 4096).unwrap();
        assert!(!file.is_current() && other.is_current());
        unlink(&name);
    }

    #[test]
    fn a_segment_that_others_may_write_is_refused() {
        let name = name("mode");
        let file = SegmentFile::create(&name, 4096).unwrap();
        nix::sys::stat::fchmod(&file.fd, Mode::from_bits_truncate(0o620)).unwrap();
        assert!(matches!(
            SegmentFile::open(&name, Access::ReadOnly),
            Err(SegmentError::WrongMode { found: 0o620, .. })
        ));
        unlink(&name);
    }

    #[test]
    fn more_than_the_file_system_holds_is_an_error_with_the_numbers_and_what_helps() {
        let name = name("full");
        let file = SegmentFile::create(&name, 1 << 44).unwrap();
        let result = file.allocate(0, 1 << 44);
        unlink(&name);
        let error = result.unwrap_err();
        assert!(matches!(error, SegmentError::NoSpace { bytes, .. } if bytes == 1 << 44), "{error:?}");
        for helps in ["--shm-size", "free some of it", "--arena"] {
            assert!(error.to_string().contains(helps), "{error}");
        }
    }

    #[test]
    fn populating_gives_memory_and_keeps_what_is_in_it() {
        let name = name("populate");
        let file = SegmentFile::create(&name, 8192).unwrap();
        unlink(&name);
        file.allocate(0, 8192).unwrap();
        let mapping = file.map(8192, Access::ReadWrite).unwrap();
        // SAFETY: inside the mapping, and nobody else uses this segment.
        unsafe { mapping.base().as_ptr().add(5000).write_volatile(77) };
        file.populate(0, 8192).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { mapping.base().as_ptr().add(5000).read_volatile() }, 77);
        assert!(file.populate(8192, 4096).is_err(), "there is nothing behind the end");
        assert!(file.populate(0, 0).is_err());
    }

    #[test]
    fn a_byte_is_locked_by_an_open_file_and_seen_from_every_other() {
        let name = name("byte");
        let first = SegmentFile::create(&name, 4096).unwrap();
        let second = first.reopen().unwrap();
        let reader = SegmentFile::open(&name, Access::ReadOnly).unwrap();
        assert!(!reader.is_byte_locked(64).unwrap());
        assert!(first.try_lock_byte(64).unwrap());
        assert!(first.try_lock_byte(64).unwrap(), "it is ours already");
        assert!(!second.try_lock_byte(64).unwrap());
        assert!(second.try_lock_byte(128).unwrap());
        assert_eq!(
            [64, 65, 128, 192].map(|at| reader.is_byte_locked(at).unwrap()),
            [true, false, true, false]
        );
        // Closing a descriptor of another open file of the same segment ends no lock.
        drop(first.reopen().unwrap());
        assert!(reader.is_byte_locked(64).unwrap());
        first.unlock_byte(64).unwrap();
        drop(second);
        assert!(!reader.is_byte_locked(64).unwrap() && !reader.is_byte_locked(128).unwrap());
        unlink(&name);
        assert!(first.reopen().is_err());
    }

    #[test]
    fn a_lock_is_exclusive_between_open_files() {
        let name = name("lock");
        let first = SegmentFile::create(&name, 4096).unwrap();
        let second = SegmentFile::open(&name, Access::ReadWrite).unwrap();
        let held = first.try_lock().unwrap();
        assert!(second.try_lock().is_none());
        drop(held);
        assert!(second.try_lock().is_some());
        unlink(&name);
    }
}
