//! Messages over pipes: a length, then the message in postcard's format.

use anyhow::{Context, anyhow, bail};
use kvring_shm_abi::sync::{AtomicBool, Ordering};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of the length before a message.
const HEAD: usize = 4;
/// The longest message. Where the length says more, something else has written to the pipe.
const MESSAGE_MAX: usize = 64 << 20;
/// How many bytes a pipe takes without blocking, once it polls as writable (`PIPE_BUF`).
const WRITE_AT_ONCE: usize = 4096;
/// The longest single wait, after which a waiting thread looks whether there is an [`Abort`].
const SLICE: Duration = Duration::from_millis(50);

/// Gives up all waiting, from another thread.
#[derive(Clone, Debug)]
pub struct Abort(Arc<AbortFlags>);

#[derive(Debug)]
struct AbortFlags {
    on: AtomicBool,
    interrupted: AtomicBool,
}

impl Default for Abort {
    fn default() -> Abort {
        Abort(Arc::new(AbortFlags { on: AtomicBool::new(false), interrupted: AtomicBool::new(false) }))
    }
}

impl Abort {
    /// From here on every wait is an error.
    pub fn now(&self) {
        self.0.on.store(true, Ordering::Relaxed);
    }

    /// The same, because the user has interrupted the run. False if the user had done so before.
    pub fn interrupt(&self) -> bool {
        self.now();
        !self.0.interrupted.swap(true, Ordering::Relaxed)
    }

    /// Has somebody given up?
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.on.load(Ordering::Relaxed)
    }

    /// Has the user interrupted the run?
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.0.interrupted.load(Ordering::Relaxed)
    }
}

/// Both directions between two processes.
#[derive(Debug)]
pub struct Pipe {
    input: File,
    output: File,
    /// Read, but not yet a whole message.
    buffer: Vec<u8>,
    abort: Abort,
}

impl Pipe {
    /// A pair of pipes: messages come from `input`, and go to `output`.
    #[must_use]
    pub fn new(input: OwnedFd, output: OwnedFd, abort: Abort) -> Pipe {
        Pipe { input: input.into(), output: output.into(), buffer: Vec::new(), abort }
    }

    /// A child's end: its standard input and output.
    ///
    /// # Errors
    /// One of them is closed.
    #[allow(clippy::disallowed_methods, reason = "its parent reads it, and is told of every failure")]
    pub fn to_parent() -> anyhow::Result<Pipe> {
        let input = std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
        let output = std::io::stdout().as_fd().try_clone_to_owned().context("standard output")?;
        Ok(Pipe::new(input, output, Abort::default()))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The other side has closed its end, or does not read until the deadline.
    pub fn send(&mut self, message: &impl Serialize, deadline: Instant) -> anyhow::Result<()> {
        let mut bytes = postcard::to_extend(message, vec![0; HEAD]).context("encoding a message")?;
        let length = u32::try_from(bytes.len() - HEAD).context("a message of more than 4 GiB")?;
        bytes[..HEAD].copy_from_slice(&length.to_le_bytes());
        for part in bytes.chunks(WRITE_AT_ONCE) {
            wait(&self.output, PollFlags::POLLOUT, Some(deadline), &self.abort)?;
            self.output.write_all(part).context("writing to the pipe")?;
        }
        Ok(())
    }

    /// The next message; `None` where the other side has closed its end between two messages. Without a deadline it waits for
    /// as long as the other side lives.
    ///
    /// # Errors
    /// No message comes until the deadline, or what comes is not a message.
    pub fn receive<T: DeserializeOwned>(&mut self, deadline: Option<Instant>) -> anyhow::Result<Option<T>> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            wait(&self.input, PollFlags::POLLIN, deadline, &self.abort)?;
            let before = self.buffer.len();
            self.buffer.resize(before + (64 << 10), 0);
            let read = self.input.read(&mut self.buffer[before..]);
            self.buffer.truncate(before + read.as_ref().copied().unwrap_or(0));
            match read {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => bail!("the pipe was closed in the middle of a message"),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("reading from the pipe"),
            }
        }
    }

    /// Where messages come from, to be waited for together with others.
    #[must_use]
    pub fn input(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    /// All messages that have come, or come within `patience` (rounded up to whole milliseconds); and whether more may come.
    ///
    /// # Errors
    /// What comes is not a message.
    pub fn drain<T: DeserializeOwned>(&mut self, patience: Duration) -> anyhow::Result<(Vec<T>, bool)> {
        let timeout = PollTimeout::try_from(patience.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
        let mut open = true;
        match poll(&mut [PollFd::new(self.input.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => {
                let before = self.buffer.len();
                self.buffer.resize(before + (64 << 10), 0);
                let read = self.input.read(&mut self.buffer[before..]);
                self.buffer.truncate(before + read.as_ref().copied().unwrap_or(0));
                // A process that was killed in the middle of a message has closed the pipe like any other.
                open = read.context("reading from the pipe")? > 0;
            }
            Err(errno) => return Err(errno).context("poll"),
        }
        let mut messages = Vec::new();
        while let Some(message) = self.take()? {
            messages.push(message);
        }
        Ok((messages, open))
    }

    /// A whole message from the buffer, if there is one.
    fn take<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        let Some(head) = self.buffer.first_chunk::<HEAD>() else { return Ok(None) };
        let length = u32::from_le_bytes(*head) as usize;
        if length > MESSAGE_MAX {
            bail!(
                "expected a message of up to {MESSAGE_MAX} bytes, got {length}: who else writes to this pipe?"
            );
        }
        let Some(body) = self.buffer.get(HEAD..HEAD + length) else { return Ok(None) };
        let message = postcard::from_bytes(body).map_err(|error| anyhow!("decoding a message: {error}"))?;
        self.buffer.drain(..HEAD + length);
        Ok(Some(message))
    }
}

/// Waits until there is something to read, or its end.
///
/// # Errors
/// Nothing comes until the deadline, or the run is given up.
pub fn wait_readable(file: &File, deadline: Instant, abort: &Abort) -> anyhow::Result<()> {
    wait(file, PollFlags::POLLIN, Some(deadline), abort)
}

/// Waits until the descriptor is ready (or at its end).
fn wait(file: &File, events: PollFlags, deadline: Option<Instant>, abort: &Abort) -> anyhow::Result<()> {
    loop {
        if abort.is_on() {
            bail!("the run was given up");
        }
        let now = Instant::now();
        let left = deadline.map_or(SLICE, |deadline| deadline.saturating_duration_since(now));
        if left.is_zero() {
            bail!("nothing happened by the deadline");
        }
        // At least a millisecond, so that the end of a wait does not spin.
        let slice = left.min(SLICE).max(Duration::from_millis(1));
        let timeout = PollTimeout::try_from(slice).unwrap_or(PollTimeout::from(50u8));
        match poll(&mut [PollFd::new(file.as_fd(), events)], timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno).context("poll"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Pipe, Pipe, Abort) {
        let abort = Abort::default();
        let (to_b_read, to_b_write) = std::io::pipe().unwrap();
        let (to_a_read, to_a_write) = std::io::pipe().unwrap();
        let a = Pipe::new(to_a_read.into(), to_b_write.into(), abort.clone());
        let b = Pipe::new(to_b_read.into(), to_a_write.into(), Abort::default());
        (a, b, abort)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn messages_arrive_whole_and_in_order_also_long_ones() {
        let (mut a, mut b, _) = pair();
        let long: Vec<u64> = (0..100_000).collect();
        let sent = long.clone();
        let sender = std::thread::spawn(move || {
            a.send(&vec![7u64], soon()).unwrap();
            a.send(&sent, soon()).unwrap();
        });
        assert_eq!(b.receive::<Vec<u64>>(Some(soon())).unwrap(), Some(vec![7]));
        assert_eq!(b.receive::<Vec<u64>>(Some(soon())).unwrap(), Some(long));
        sender.join().unwrap();
        assert_eq!(b.receive::<Vec<u64>>(None).unwrap(), None, "the other side has closed its end");
    }

    #[test]
    fn silence_ends_at_the_deadline_and_a_full_pipe_too() {
        let (mut a, b, _) = pair();
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = a.receive::<u32>(Some(deadline)).unwrap_err().to_string();
        assert_eq!(error, "nothing happened by the deadline");
        let deadline = Instant::now() + Duration::from_millis(50);
        assert!(a.send(&vec![0xffu8; 1 << 20], deadline).is_err(), "nobody reads");
        drop(b);
    }

    #[test]
    fn an_abort_ends_a_wait_without_a_deadline() {
        let (mut a, _b, abort) = pair();
        let waiting = std::thread::spawn(move || a.receive::<u32>(None).unwrap_err().to_string());
        abort.now();
        assert_eq!(waiting.join().unwrap(), "the run was given up");
    }

    #[test]
    fn a_drain_takes_what_has_come_and_says_when_nothing_more_will() {
        let (mut a, mut b, _) = pair();
        assert_eq!(b.drain::<u32>(Duration::ZERO).unwrap(), (vec![], true));
        a.send(&1u32, soon()).unwrap();
        a.send(&2u32, soon()).unwrap();
        a.output.write_all(&[4, 0]).unwrap();
        assert_eq!(b.drain::<u32>(Duration::from_secs(20)).unwrap(), (vec![1, 2], true));
        drop(a);
        assert_eq!(b.drain::<u32>(Duration::from_secs(20)).unwrap(), (vec![], false), "died while it spoke");
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (mut a, mut b, _) = pair();
        a.output.write_all(b"hello, world").unwrap();
        let error = b.receive::<u32>(Some(soon())).unwrap_err().to_string();
        assert!(error.contains("who else writes to this pipe"), "{error}");
        let (mut a, mut b, _) = pair();
        a.output.write_all(&[9, 0]).unwrap();
        drop(a);
        let error = b.receive::<u32>(Some(soon())).unwrap_err().to_string();
        assert!(error.contains("in the middle of a message"), "{error}");
    }
}
