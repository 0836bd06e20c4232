//! How soon an engine's death is noticed: by a caller that sleeps for an answer, and by a client that does nothing.

use super::Times;
use super::bare::Bare;
use super::life::{self, Life};
use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use kvring_adapter::{CallError, Client, EngineView};
use kvring_shm_abi::futex::{Deadline, monotonic_ns};
use kvring_shm_abi::life::{Life as Word, LifeWord};
use kvring_shm_abi::lobby::Lobby;
use std::sync::mpsc;
use std::time::Duration;

/// A keeper that has not acted by then never will.
const PATIENCE: Duration = Duration::from_secs(5);
/// Fewer kills than this are not worth a median, however long they take.
const KILLS_MIN: usize = 5;

/// Kills of one kind, and the limit's, one after each.
#[derive(Default)]
pub(super) struct Notices {
    pub(super) ours: Times,
    pub(super) limit: Times,
}

/// Kills engines that have allocated `arena` bytes under a caller that sleeps: `kills` of them, or as many as `budget`
/// allows. Starting one takes seconds where its successor cannot use what it had allocated.
pub(super) fn large(
    arena: u64,
    kills: usize,
    budget: Duration,
    bar: &ProgressBar,
) -> anyhow::Result<Notices> {
    bar.set_message("killing large engines under a caller");
    let deadline = Deadline::after(budget);
    let mut notices = Notices::default();
    let bare = Bare::new()?;
    let mut life = Life::start(arena)?;
    let client = life::eager_client(life.name())?;
    loop {
        life.settle(&client)?;
        notices.ours.push(under_a_caller(&mut life, &client)?);
        // The dead engine's arena is still there: this one holds it open as an engine does.
        notices.limit.push(bare.death(Some(life.name().arena()))?);
        bar.inc(1);
        let killed = notices.ours.count;
        if killed >= kills || (killed >= KILLS_MIN.min(kills) && deadline.passed()) {
            bar.inc((kills - killed) as u64);
            break;
        }
        life.restart()?;
    }
    client.shutdown();
    Ok(notices)
}

/// Kills engines with a small arena: under a caller that sleeps, and under a client that does nothing.
pub(super) fn small(arena: u64, kills: usize, bar: &ProgressBar) -> anyhow::Result<(Notices, Notices)> {
    bar.set_message("killing engines under a caller and under an idle client");
    let (mut caller, mut keeper) = (Notices::default(), Notices::default());
    let bare = Bare::new()?;
    let mut life = Life::start(arena)?;
    let client = life::eager_client(life.name())?;
    for _ in 0..kills {
        life.settle(&client)?;
        caller.ours.push(under_a_caller(&mut life, &client)?);
        let limit = bare.death(None)?;
        caller.limit.push(limit);
        keeper.limit.push(limit);
        life.restart()?;
        bar.inc(1);
        life.settle(&client)?;
        keeper.ours.push(under_a_keeper(&mut life)?);
        life.restart()?;
        bar.inc(1);
    }
    client.shutdown();
    life.stop()?;
    Ok((caller, keeper))
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

/// The engine is stopped, a call waits for its answer, the engine is killed: until the call returns.
fn under_a_caller(life: &mut Life, client: &Client) -> anyhow::Result<u64> {
    life.freeze()?;
    let call = || match client.noop() {
        Err(CallError::Dead) => Ok(()),
        other => bail!("a call under which the engine was killed: expected its death, got {other:?}"),
    };
    let noticed = after_kill(call, || life.kill())?;
    life.bury()?;
    Ok(noticed)
}

/// The engine is killed while the client's keeper sleeps and nobody calls: until the keeper has given the client's
/// entry up, which it does when everybody who asks is told of the death. (What a call would be told at once: the life
/// word is looked at each time.)
fn under_a_keeper(life: &mut Life) -> anyhow::Result<u64> {
    let lobby = EngineView::open(life.name())?.open_lobby(life.name())?;
    let entry = entry_of(&lobby, std::process::id()).context("the client's entry in the lobby")?;
    let word = &lobby.life_words[entry];
    let killed = life.kill()?;
    let deadline = Deadline::after(PATIENCE);
    while is_alive(word) {
        ensure!(!deadline.passed(), "the keeper has not noticed a death within {PATIENCE:?}");
        // The engine needs a CPU to die on, and the keeper one to wake up on.
        std::thread::yield_now();
    }
    let noticed = monotonic_ns().saturating_sub(killed);
    life.bury()?;
    Ok(noticed)
}

fn is_alive(word: &LifeWord) -> bool {
    matches!(word.life(), Word::Alive { .. })
}

/// The entry of a process's only client.
fn entry_of(lobby: &Lobby, pid: u32) -> Option<usize> {
    entries_of(lobby, pid).next()
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
