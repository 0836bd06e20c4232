//! How soon an engine's death is noticed by a caller that sleeps for an answer.
//!
//! The engine dies on one CPU and its client wakes up on another, as in every benchmark here. Left to the kernel, on a
//! machine with few CPUs, a sleeper may be woken on the CPU on which the engine dies, and a kernel that is not
//! preempted runs it only when all of the dead process's memory has been given back. That is measured as well.

use super::Times;
use super::bare::Bare;
use super::life::{self, Life};
use crate::cores::{self, Pair};
use anyhow::{Context, bail};
use indicatif::ProgressBar;
use kvring_adapter::{CallError, Client};
use kvring_shm_abi::futex::{Deadline, monotonic_ns};
use kvring_shm_abi::life::{Life as Word, LifeWord};
use kvring_shm_abi::lobby::Lobby;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Fewer kills than this are not worth a median, however long they take.
const KILLS_MIN: usize = 5;

/// Kills of one kind, and the limit's, one after each.
#[derive(Default)]
pub(super) struct Notices {
    pub(super) ours: Times,
    pub(super) limit: Times,
}

/// Kills of engines with a small arena.
#[derive(Default)]
pub(super) struct Small {
    /// Under a caller that sleeps.
    pub(super) caller: Notices,
    /// Under a caller that sleeps, all threads on whichever CPU the kernel likes.
    pub(super) anywhere: Notices,
}

/// Kills engines that have allocated `arena` bytes under a caller that sleeps: `kills` of them, or as many as `budget`
/// allows. Starting one takes seconds if it cannot use the memory that the dead one had allocated.
pub(super) fn large(
    arena: u64,
    kills: usize,
    budget: Duration,
    pair: &Pair,
    bar: &ProgressBar,
) -> anyhow::Result<Notices> {
    bar.set_message("killing large engines under a caller");
    let deadline = Deadline::after(budget);
    let mut notices = Notices::default();
    cores::on(&[pair.ours], || {
        let mut scene = Scene::new(arena, Some(pair.theirs))?;
        loop {
            // The dead engine's arena is still there: the bare process holds it open as an engine does.
            scene.round(&mut notices, Some(scene.life.name().arena()))?;
            bar.inc(1);
            let killed = notices.ours.count;
            if killed >= kills || (killed >= KILLS_MIN.min(kills) && deadline.passed()) {
                bar.inc((kills - killed) as u64);
                return Ok(());
            }
            scene.life.restart()?;
        }
    })?;
    Ok(notices)
}

/// Kills engines with a small arena, `kills` times in each way.
pub(super) fn small(arena: u64, kills: usize, pair: &Pair, bar: &ProgressBar) -> anyhow::Result<Small> {
    bar.set_message("killing engines under a caller");
    let mut small = Small::default();
    cores::on(&[pair.ours], || {
        let mut scene = Scene::new(arena, Some(pair.theirs))?;
        for _ in 0..kills {
            scene.round(&mut small.caller, None)?;
            scene.life.restart()?;
            bar.inc(1);
        }
        scene.life.stop()
    })?;
    let mut scene = Scene::new(arena, None)?;
    for _ in 0..kills {
        scene.round(&mut small.anywhere, None)?;
        scene.life.restart()?;
        bar.inc(1);
    }
    scene.life.stop()?;
    Ok(small)
}

/// An engine's name, a client of it that stays while engines come and go, and the limit.
struct Scene {
    life: Life,
    client: Arc<Client>,
    bare: Bare,
}

impl Scene {
    /// Engines die on `cpu`, if one is given.
    fn new(arena: u64, cpu: Option<usize>) -> anyhow::Result<Scene> {
        let life = Life::start(arena, None, cpu)?;
        let client = life::eager_client(life.name())?;
        Ok(Scene { life, client, bare: Bare::new(cpu)? })
    }

    /// One kill of an engine that has settled, and one of a bare process.
    fn round(&mut self, notices: &mut Notices, beside: Option<String>) -> anyhow::Result<()> {
        self.life.settle(&self.client)?;
        notices.ours.push(self.under_a_caller()?);
        self.life.bury();
        notices.limit.push(self.bare.death(beside)?);
        Ok(())
    }

    /// The engine is stopped, a call waits for its answer in the way that lookups do, the engine is killed: until the
    /// call returns.
    fn under_a_caller(&mut self) -> anyhow::Result<u64> {
        let mut probe = self.client.probe();
        // This call is not the first, so it has the attachment at hand. A first call would have to unmap the attachment that it
        // alone holds, and that takes time.
        probe.noop().context("a round trip before the death")?;
        self.life.freeze()?;
        let call = || match probe.noop() {
            Err(CallError::Dead) => Ok(()),
            other => bail!("a call under which the engine was killed: expected its death, got {other:?}"),
        };
        after_kill(call, || self.life.kill())
    }
}

/// Runs `wait` on a thread of its own and, once that sleeps, `kill`, which says when it did. Nanoseconds from there to
/// the return of `wait`.
pub(super) fn after_kill(
    wait: impl FnOnce() -> anyhow::Result<()> + Send,
    kill: impl FnOnce() -> anyhow::Result<u64>,
) -> anyhow::Result<u64> {
    std::thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let sleeper = scope.spawn(move || {
            tell.send(nix::unistd::gettid())?;
            let waited = wait();
            let returned = monotonic_ns();
            waited.map(|()| returned)
        });
        life::asleep(told.recv().context("the sleeper's thread")?)?;
        let killed = kill()?;
        let returned = sleeper.join().map_err(|_| anyhow::anyhow!("a sleeping thread panicked"))??;
        Ok(returned.saturating_sub(killed))
    })
}

fn is_alive(word: &LifeWord) -> bool {
    matches!(word.life(), Word::Alive { .. })
}

/// The entries of a process's clients.
pub(super) fn entries_of(lobby: &Lobby, pid: u32) -> impl Iterator<Item = usize> {
    let words = lobby.life_words.iter().zip(lobby.entries.iter()).enumerate();
    words
        .filter(move |(_, (word, entry))| {
            is_alive(word) && entry.read().is_some_and(|content| content.pid == pid)
        })
        .map(|(index, _)| index)
}
