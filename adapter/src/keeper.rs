//! The keeper: a client's small parked thread.
//!
//! It owns the client's life word, so it is the client's life as far as the engine can see. It attaches, makes and
//! repeats registrations, notices death and restart (its own sleep includes the engine's life word and incarnation),
//! and attaches again with back-off, so that no caller's thread ever does. It must not unwind: were it to end while
//! copies of this process still run, the engine would take the client for dead and give their slots away. So a panic
//! degrades the client for good and keeps the life word.

use crate::attachment::{AttachError, Attachment, attach};
use crate::client::{Registered, Shared};
use crate::error::{CallError, RegisterError};
use crate::health::Health;
use crate::link::Undo;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::futex::{Deadline, wait_any};
use kvring_shm_abi::life::{Life, LifeWord, RobustList};
use kvring_shm_abi::message::{Record, Registration, Request};
use kvring_shm_abi::sync::Ordering;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the keeper looks at the beat while something is in flight: below the gap that counts towards a stall.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often it looks around at all: a safety net, not a mechanism.
const IDLE_EVERY: Duration = Duration::from_secs(10);

/// Starts the thread.
pub(crate) fn spawn(shared: Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("kvring-keeper".into()).stack_size(256 << 10).spawn(move || {
        let mut held: Option<RobustList> = None;
        let ran = std::panic::catch_unwind(AssertUnwindSafe(|| run(&shared, &mut held)));
        if ran.is_err() {
            shared.set_current(Err(Health::ShutDown));
            tracing::error!("the keeper thread failed; this client stays degraded until it is made again");
            // The life word stays ours until the client is shut down: copies may still run.
            while !shared.stop.load(Ordering::Acquire) {
                let seen = shared.control.load(Ordering::Acquire);
                shared.wait_for_poke(seen, Deadline::after(IDLE_EVERY));
            }
        }
        drop(held);
    })
}

fn run(shared: &Arc<Shared>, held: &mut Option<RobustList>) {
    let mut backoff = shared.checked.options.backoff_min;
    let mut last_error = String::new();
    loop {
        let seen = shared.control.load(Ordering::Acquire);
        if shared.stop.load(Ordering::Acquire) {
            break;
        }
        match attach(shared) {
            Ok((attachment, list)) => {
                let attachment = Arc::new(attachment);
                *held = Some(list);
                shared.set_current(Ok(attachment.clone()));
                backoff = shared.checked.options.backoff_min;
                last_error.clear();
                let why = keep(shared, &attachment);
                if why == Why::Lost {
                    shared.set_current(Err(attachment_health(&attachment)));
                }
                // No slot of ours may be given away while a copy into it runs.
                attachment.writers.close();
                if why == Why::Stop {
                    leave(shared, &attachment);
                    shared.set_current(Err(Health::ShutDown));
                }
                // What waited in this attachment's outbox belongs to leases and slots that its engine frees itself,
                // at our detachment or with its own death.
                drop(attachment);
                // Gives the entry up: the engine reclaims whatever this attachment still had.
                *held = None;
            }
            Err(error) => {
                log_once(shared, &error, &mut last_error);
                set_health(shared, error.health());
                shared.wait_for_poke(seen, Deadline::after(backoff));
                backoff = (backoff * 2).min(shared.checked.options.backoff_max);
            }
        }
    }
    shared.set_current(Err(Health::ShutDown));
}

fn log_once(shared: &Shared, error: &AttachError, last: &mut String) {
    let text = error.to_string();
    if *last != text {
        tracing::warn!(engine = %shared.checked.options.engine, role = shared.role.as_str(), %error, "not attached");
        *last = text;
    }
}

fn set_health(shared: &Shared, health: Health) {
    let same = matches!(&*shared.current(), Err(before) if *before == health);
    if !same {
        shared.set_current(Err(health));
    }
}

fn attachment_health(attachment: &Attachment) -> Health {
    match attachment.link.health() {
        Health::Healthy | Health::Stalled => Health::Attaching,
        other => other,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    /// The client is shut down.
    Stop,
    /// The engine died, was restarted, or no longer reads our channel.
    Lost,
}

/// Keeps one attachment until it is lost or the client ends.
fn keep(shared: &Arc<Shared>, attachment: &Arc<Attachment>) -> Why {
    let link = &attachment.link;
    let generation = shared.generation.load(Ordering::Acquire);
    let mut retry = shared.checked.options.backoff_min;
    loop {
        let seen = shared.control.load(Ordering::Acquire);
        if shared.stop.load(Ordering::Acquire) {
            return Why::Stop;
        }
        let life = &link.engine.life_words[link.entry];
        let raw = life.raw();
        let (answers, answered) = link.engine.attach[link.entry].word();
        if link.alive().is_err() || link.is_broken() || link.detached().is_some() {
            if link.detached() == Some(AttachStatus::Breach) {
                tracing::error!("the engine detached this client for a breach of protocol; attaching again");
            }
            link.rouse();
            return Why::Lost;
        }
        let (left, left_before) = link.left();
        link.stall.look(link.engine.epoch().beat());
        link.tend();
        let registered = register_all(shared, attachment, generation);
        let pause = if registered.is_err() {
            retry = (retry * 2).min(shared.checked.options.backoff_max);
            retry
        } else {
            retry = shared.checked.options.backoff_min;
            if link.is_idle() { IDLE_EVERY } else { LOOK_EVERY }
        };
        if LifeWord::interpret(raw) == Life::Dead {
            continue;
        }
        wait_any(
            &[
                (&shared.control, seen),
                (life.futex(), raw),
                (link.engine.epoch().incarnation_word(), link.incarnation),
                (answers, answered),
                (left, left_before),
            ],
            Deadline::after(pause),
        );
        if life.life() == Life::Dead {
            // The kernel wakes one sleeper per word: pass it on to the callers' threads.
            kvring_shm_abi::futex::wake_all(life.futex());
        }
    }
}

/// Makes the registrations that this attachment does not have yet. An error means: try again later.
fn register_all(shared: &Shared, attachment: &Arc<Attachment>, generation: u64) -> Result<(), CallError> {
    for registered in shared.registrations() {
        // A refusal is an outcome too: it is not asked for again before the next attachment, which may be to an engine
        // with more room.
        if lock_outcome(&registered).as_ref().is_some_and(|(at, _)| *at == generation) {
            continue;
        }
        match register(shared, attachment, &registered.record) {
            Err(RegisterError::Call(error)) => {
                tracing::debug!(%error, "registration not through yet");
                return Err(error);
            }
            outcome => {
                if let Err(error) = &outcome {
                    tracing::error!(%error, "the engine refused the registration; nothing is cached");
                }
                *lock_outcome(&registered) = Some((generation, outcome));
                shared.notify_changed();
            }
        }
    }
    Ok(())
}

fn lock_outcome(
    registered: &Registered,
) -> std::sync::MutexGuard<'_, Option<(u64, Result<u32, RegisterError>)>> {
    registered.outcome.lock().unwrap_or_else(PoisonError::into_inner)
}

fn register(
    shared: &Shared,
    attachment: &Arc<Attachment>,
    record: &Registration,
) -> Result<u32, RegisterError> {
    let pending = attachment.link.submit(
        Registration::WORDS,
        |_| Undo::Nothing,
        |payload, region| {
            let written = payload.write(region.offset, bytemuck::cast_slice(core::slice::from_ref(record)));
            debug_assert!(written.is_ok());
            Request::Register { record: region.offset }
        },
    )?;
    let answer = pending.wait(shared.checked.options.register_timeout)?;
    crate::status::check_registration(&answer.completion, record)
}

/// Says goodbye, so that the engine frees everything at once. If it does not answer, our life word says the same.
fn leave(shared: &Shared, attachment: &Arc<Attachment>) {
    let link = &attachment.link;
    if !link.is_healthy() {
        return;
    }
    let _ = link.call(Request::Detach, shared.checked.options.drain_timeout);
}
