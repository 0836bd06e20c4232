//! Ways for a process, or one thread of it, to end. Signals ask for them, so that it ends in the middle of anything.
//!
//! The handlers run on the thread that the signal finds. In an engine's process all threads but the service thread have
//! been started with these signals blocked.

use kvring_shm_abi::sync::{AtomicBool, AtomicU32, Ordering};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The variable that says how an engine's process ends.
pub const ENDS: &str = "KVRING_TEST_ENDS";

/// A way to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum End {
    /// A store to an address that is not there.
    Segv = 1,
    /// `abort()`.
    Abort = 2,
    /// Another program in its place.
    Exec = 3,
    /// The thread alone: the process goes on.
    Thread = 4,
    /// A panic, where nothing can unwind: as in a build with `panic = "abort"`.
    Panic = 5,
    /// None: the engine forks a child that lives on, and goes on itself.
    Fork = 6,
}

impl End {
    /// All that end an engine.
    pub const ALL: [End; 5] = [End::Segv, End::Abort, End::Exec, End::Thread, End::Panic];

    /// Its name in [`ENDS`].
    pub fn name(self) -> String {
        (self as u32).to_string()
    }
}

/// Seconds after which a forked child ends by itself, so that a test that fails leaves no process behind.
const CHILD_LIVES: u32 = 1200;

static END: AtomicU32 = AtomicU32::new(0);
static GO: AtomicBool = AtomicBool::new(false);

/// Installs what [`ENDS`] asks for: SIGUSR1 makes the thread hang, in the middle of whatever it does, until SIGUSR2 ends it.
/// A fork needs SIGUSR2 alone.
pub fn install() {
    let Some(end) = std::env::var(ENDS).ok().and_then(|end| end.parse().ok()) else { return };
    if end == End::Fork as u32 {
        // Not in a handler: `fork` waits for the allocator, and the thread may be in the middle of a call of it.
        on(Signal::SIGUSR2, go);
        std::thread::spawn(|| {
            while !GO.swap(false, Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            fork_idle();
        });
        return;
    }
    END.store(end, Ordering::Relaxed);
    on(Signal::SIGUSR1, hang);
    on(Signal::SIGUSR2, go);
}

fn on(signal: Signal, handler: extern "C" fn(libc::c_int)) {
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: both handlers call what may be called in one, but for the panic, which ends the process.
    unsafe { sigaction(signal, &action) }.expect("a handler");
}

/// Blocks both signals in this thread and those that it starts.
pub fn block() {
    mask().thread_block().expect("a signal mask");
}

/// Unblocks both in this thread.
pub fn unblock() {
    mask().thread_unblock().expect("a signal mask");
}

fn mask() -> SigSet {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR1);
    mask.add(Signal::SIGUSR2);
    mask
}

extern "C" fn go(_: libc::c_int) {
    GO.store(true, Ordering::Relaxed);
}

extern "C" fn hang(_: libc::c_int) {
    while !GO.swap(false, Ordering::Relaxed) {
        let pause = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        // SAFETY: a sleep.
        unsafe { libc::nanosleep(&pause, core::ptr::null_mut()) };
    }
    end(END.load(Ordering::Relaxed));
}

/// Ends in this way, on this thread.
#[allow(clippy::panic, reason = "one of the ways")]
pub fn end(how: u32) {
    match how {
        // SAFETY: it is not sound. This process is to end by a segmentation fault.
        1 => unsafe { core::ptr::without_provenance_mut::<u8>(8).write_volatile(1) },
        2 => std::process::abort(),
        3 => {
            let (program, argument) = (c"/bin/sleep", c"1200");
            let arguments = [program.as_ptr(), argument.as_ptr(), core::ptr::null()];
            // SAFETY: strings and an array that end with zeros.
            unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
        }
        // SAFETY: this thread ends without running its destructors, as a thread that the kernel kills does.
        4 => unsafe {
            libc::syscall(libc::SYS_exit, 0);
        },
        5 => panic!("a test asked for a panic in the service thread"),
        _ => {}
    }
}

extern "C" fn end_thread(_: libc::c_int) {
    end(End::Thread as u32);
}

/// Ends the threads of this process that have this name, and waits until they are gone.
pub fn end_threads(name: &str) {
    on(Signal::SIGUSR1, end_thread);
    let tasks = std::fs::read_dir("/proc/self/task").expect("our own threads").flatten();
    let named = tasks.filter(|task| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    });
    let mut ended = 0;
    for task in named {
        let tid: i32 = task.file_name().to_string_lossy().parse().expect("a thread's id");
        // SAFETY: a signal to a thread of ours.
        unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, libc::SIGUSR1) };
        crate::wait::eventually("a thread that ends", || !task.path().exists());
        ended += 1;
    }
    assert!(ended > 0, "no thread is called {name}");
}

/// Forks a child that does nothing for as long as it lives; returns its id.
pub fn fork_idle() -> i32 {
    // SAFETY: the child calls nothing but a sleep.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::alarm(CHILD_LIVES);
            loop {
                libc::pause();
            }
        }
        pid
    }
}
