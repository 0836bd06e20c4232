//! The limit of noticing a death: a process with one robust futex in shared memory, and one sleeper on it.

use crate::child::{self, Child, Job};
use crate::cores;
use anyhow::ensure;
use kvring_rig::pipe::Pipe;
use kvring_shm_abi::futex::{self, Deadline, monotonic_ns};
use kvring_shm_abi::life::{Life, LifeWord, RobustList};
use kvring_shm_abi::mapping::View;
use kvring_shm_abi::segment::{self, Access, SegmentFile};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// The things that the process has.
#[derive(Serialize, Deserialize)]
pub(crate) struct BareJob {
    /// The segment with the word.
    segment: String,
    /// A file that is held open and not mapped, as an engine holds its arena.
    beside: Option<String>,
    /// The CPU that it dies on.
    cpu: Option<usize>,
}

/// Bytes of the segment.
const BYTES: usize = 4096;
/// A sleep that nobody ends must end.
const PATIENCE: Duration = Duration::from_secs(5);

/// The shared word, and the CPU on which its owners die.
pub(super) struct Bare {
    segment: String,
    words: View<LifeWord>,
    cpu: Option<usize>,
}

impl Bare {
    /// Makes the word. Its owners die on `cpu`, if one is given.
    pub(super) fn new(cpu: Option<usize>) -> anyhow::Result<Bare> {
        let segment = format!("kvring-{}", child::unique_name());
        let mapping = Arc::new(segment::create_shared(&segment, BYTES)?);
        Ok(Bare { segment, words: View::new(&mapping, 0, 1)?, cpu })
    }

    /// One death: from just before kill(2) to the return of the sleeper's wait.
    pub(super) fn death(&self, beside: Option<String>) -> anyhow::Result<u64> {
        let job = BareJob { segment: self.segment.clone(), beside, cpu: self.cpu };
        let mut child = Child::spawn(&job)?;
        child.read::<()>()?;
        let word = &self.words[0];
        let noticed = super::notice::after_kill(
            || until_dead(word),
            || {
                let before = monotonic_ns();
                child.signal(Signal::SIGKILL)?;
                Ok(before)
            },
        )?;
        child.reap();
        ensure!(word.reset(), "expected a dead word, found {:?}", word.life());
        Ok(noticed)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        segment::unlink(&self.segment);
    }
}

/// Sleeps until the word's owner has died, or has given it up.
fn until_dead(word: &LifeWord) -> anyhow::Result<()> {
    let deadline = Deadline::after(PATIENCE);
    loop {
        let raw = word.raw();
        if LifeWord::interpret(raw) == Life::Dead {
            return Ok(());
        }
        ensure!(!deadline.passed(), "a death was not noticed within {PATIENCE:?}");
        futex::wait_any(&[(word.futex(), raw)], deadline);
    }
}

impl Job for BareJob {
    const NAME: &'static str = "bare";

    /// The child's side: claims the word and waits for its death.
    fn be(self, mut pipe: Pipe) -> anyhow::Result<()> {
        if let Some(cpu) = self.cpu {
            cores::pin(&[cpu])?;
        }
        let mapping = Arc::new(segment::open_shared(&self.segment, BYTES)?);
        let mut list = RobustList::register(View::new(&mapping, 0, 1)?)?;
        list.claim(0)?;
        let _beside = self.beside.map(|name| SegmentFile::open(&name, Access::ReadWrite)).transpose()?;
        child::answer(&mut pipe, &())?;
        child::until_closed(&mut pipe);
        Ok(())
    }
}
