//! The keeper: a client's own thread, which sleeps nearly always.
//!
//! The keeper holds the client's life word, so for the engine the client lives as long as this thread does. The keeper
//! attaches, makes and repeats registrations, notices the engine's death and restart (it sleeps on the engine's life
//! word and incarnation too), and attaches again with back-off, so that no caller's thread ever has to. It must not end
//! while copies of this process still run: the engine would take the client for dead and give the slots away that they
//! write. So a panic in it degrades the client for good, and the thread goes on holding the life word.
//!
//! ```text
//!            ╭───────────── the engine died, or was restarted ◀──────────╮
//!            ▼   (suspended: the claim, the arena, what is held, stay)    │
//! detached ─▶ attach ─▶ register ─▶ declare (where there was an engine before) ─▶ attached
//!    ▲       │                                                            │
//!    ╰───────┴── another arena, or thrown out: copies end, all is given up┴─▶ stop
//! ```

use crate::attachment::{Attachment, Attempt, Claim, attach};
use crate::error::{AttachError, CallError, RegisterError};
use crate::health::Health;
use crate::link::Undo;
use crate::rejoin;
use crate::shared::{Outcome, Shared};
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::futex::{Deadline, monotonic_ns, wait_any_sliced};
use kvring_shm_abi::life::{Life, LifeWord};
use kvring_shm_abi::message::{Record, Registration, Request};
use kvring_shm_abi::sync::Ordering;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the keeper looks at the beat while an operation is in flight. It is shorter than the longest gap between
/// two looks that still counts towards a stall (100 ms).
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often the keeper looks around when nothing was in flight at its last look. A lookup wakes nobody when it tells the engine what
/// it holds; so this is how late the keeper begins to watch the beat of an engine that does not read that.
const IDLE_EVERY: Duration = Duration::from_secs(1);
/// How late the keeper notices everything but a poke (above all the engine's death and restart) where the kernel has no
/// `futex_waitv`: there a thread can sleep on one word only, and the keeper takes the one that this process pokes. A
/// keeper sleeps nearly always, so this interval is the cost of an idle client: 20 wake-ups a second, 0.05 % of a core
/// (10 ms would cost 0.25 %, and 64 such clients more than the engine). Callers do not depend on it: one that waits for
/// an answer looks more often, and each new call reads the engine's life word itself.
const SLICE: Duration = Duration::from_millis(50);

/// Starts the keeper's thread.
pub(crate) fn spawn(shared: Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("kvring-keeper".into()).stack_size(256 << 10).spawn(move || {
        let mut held: Option<Claim> = None;
        let ran = std::panic::catch_unwind(AssertUnwindSafe(|| run(&shared, &mut held)));
        if ran.is_err() {
            shared.set_detached(Health::ShutDown);
            tracing::error!(
                "kvring's own thread failed (a bug: please report it); this process goes on without the kvring engine"
            );
            // Keep the life word until the client is shut down: copies may still run.
            while !shared.stop.load(Ordering::Acquire) {
                let seen = shared.control.load(Ordering::Acquire);
                shared.wait_for_poke(seen, Deadline::after(IDLE_EVERY));
            }
        }
        drop(held);
    })
}

fn run(shared: &Arc<Shared>, held: &mut Option<Claim>) {
    let mut backoff = shared.checked.options.backoff_min;
    let attempt = Attempt {
        checked: &shared.checked,
        role: shared.role,
        fork: shared.fork,
        dma: &shared.dma,
        control: &shared.control,
        stop: &shared.stop,
        on_stall: &|| shared.set_suspended(Health::Stalled),
    };
    loop {
        let seen = shared.control.load(Ordering::Acquire);
        if shared.stop.load(Ordering::Acquire) {
            break;
        }
        // Read before the attempt, so that a change during the attempt ends the sleep after it.
        let incarnation = held.as_ref().map(|claim| claim.incarnation().1);
        // If this claim was ever attached, the engine expects a declaration, even if that attachment was never used.
        let rejoins = held.as_ref().is_some_and(|claim| claim.used);
        match attach(&attempt, held) {
            Ok(attachment) => {
                let attachment = Arc::new(attachment);
                let why = match enter(shared, &attachment, rejoins) {
                    Ok(()) => {
                        backoff = shared.checked.options.backoff_min;
                        shared.set_attached(attachment.clone());
                        keep(shared, &attachment)
                    }
                    Err(why) => why,
                };
                match why {
                    // A successor may take over: keep the claim, the ledger and the leases.
                    Why::EngineGone => shared.set_suspended(attachment_health(&attachment)),
                    Why::Detached => {
                        shared.set_detached(attachment_health(&attachment));
                        give_up(shared, held);
                    }
                    Why::Stop => {
                        // The engine frees our slots when we detach, so the last copy into them must have ended.
                        attachment.writers.close();
                        leave(shared, &attachment);
                        break;
                    }
                }
            }
            Err(error) => {
                tracing::debug!(%error, "not attached");
                if held.as_ref().is_some_and(|claim| !claim.used || error.ends_claim()) {
                    // Let go of the attachment before waiting for the last copy: its memory may be wanted now.
                    shared.set_detached(error.health());
                    give_up(shared, held);
                    // Try with another claim at once. Not after `ClaimLost`: a peer that overwrites our claims again
                    // and again would keep this thread busy.
                    if matches!(error, AttachError::AnotherStart(_)) {
                        continue;
                    }
                } else if error.is_no_room() {
                    // The old channel may be what takes the room, so let go of it. Loads then have to wait for the new
                    // attachment.
                    shared.set_detached(error.health());
                    rejoin::let_go(shared);
                }
                set_health(shared, error.health());
                sleep(shared, seen, held.as_ref().zip(incarnation), Deadline::after(backoff));
                backoff = (backoff * 2).min(shared.checked.options.backoff_max);
            }
        }
    }
    shared.set_detached(Health::ShutDown);
    give_up(shared, held);
}

/// Sleeps until poked, until the incarnation of the held claim's engine changes, or until the deadline.
fn sleep(shared: &Shared, seen: u32, held: Option<(&Claim, u32)>, until: Deadline) {
    match held {
        Some((claim, incarnation)) => {
            let words = [(&shared.control, seen), (claim.incarnation().0, incarnation)];
            wait_any_sliced(&words, until, SLICE);
        }
        None => {
            shared.wait_for_poke(seen, until);
        }
    }
}

/// Gives the claim up, after the last copy into its arena has ended, because the engine then frees all slots that the
/// entry was writing.
fn give_up(shared: &Shared, held: &mut Option<Claim>) {
    if let Some(claim) = held.take() {
        claim.writers.close();
        shared.ledger.forget();
        shared.leases.forget();
        // No device writes for this entry any more, so the engine need not wait for the end of this process.
        shared.dma().given_up(claim.holds());
        failpoint::here(Place::ClientGivesUp);
        drop(claim);
    }
}

/// Makes an attachment that the engine has accepted ready for callers: makes the registrations and, if the claim was
/// attached before, declares what it still holds. Tries again until all of it is done or the attachment is over.
fn enter(shared: &Arc<Shared>, attachment: &Arc<Attachment>, rejoins: bool) -> Result<(), Why> {
    let mut pause = shared.checked.options.backoff_min;
    loop {
        let seen = shared.control.load(Ordering::Acquire);
        let (left, left_before) = attachment.link.left();
        if let Some(why) = over(shared, attachment) {
            return Err(why);
        }
        let done = register_all(shared, attachment, rejoins).and_then(|()| match rejoins {
            true => rejoin::declare(shared, attachment),
            false => Ok(()),
        });
        match done {
            Ok(()) => {
                rejoin::settle(shared, attachment, rejoins);
                failpoint::here(Place::ClientEntered);
                return Ok(());
            }
            Err(error) => tracing::debug!(%error, "not through yet with a new attachment"),
        }
        // Drain the answers that came too late for the failed attempt.
        attachment.link.tend();
        wait_any_sliced(&[(&shared.control, seen), (left, left_before)], Deadline::after(pause), SLICE);
        pause = (pause * 2).min(shared.checked.options.backoff_max);
    }
}

/// Why this attachment is over; `None` while it is not.
fn over(shared: &Shared, attachment: &Attachment) -> Option<Why> {
    let link = &attachment.link;
    if shared.stop.load(Ordering::Acquire) {
        return Some(Why::Stop);
    }
    if link.alive().is_err() {
        return Some(Why::EngineGone);
    }
    if link.is_broken() || link.detached().is_some() {
        if link.detached() == Some(AttachStatus::Breach) {
            tracing::error!(
                "the kvring engine has closed this connection, because it was asked for what it does not understand (a bug: \
                 please report it); connecting again"
            );
        }
        return Some(Why::Detached);
    }
    None
}

fn set_health(shared: &Shared, health: Health) {
    if !shared.is_health(&health) {
        shared.set_suspended(health);
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
    /// The engine died, or was restarted.
    EngineGone,
    /// The engine lives but has stopped reading our channel, or its answers make no sense.
    Detached,
}

/// Keeps one attachment until it is lost or the client ends.
fn keep(shared: &Arc<Shared>, attachment: &Arc<Attachment>) -> Why {
    let link = &attachment.link;
    let mut retry = shared.checked.options.backoff_min;
    let mut was_stalled = false;
    loop {
        let seen = shared.control.load(Ordering::Acquire);
        let life = &link.engine.life_words[link.entry];
        let raw = life.raw();
        let (answers, answered) = link.engine.attach[link.entry].word();
        link.look_at_lock(monotonic_ns());
        if let Some(why) = over(shared, attachment) {
            link.rouse();
            return why;
        }
        let (left, left_before) = link.left();
        link.stall.look(link.engine.epoch().beat());
        let is_stalled = link.stall.troubled(|| link.engine.epoch().beat());
        if is_stalled != was_stalled {
            was_stalled = is_stalled;
            told_stall(shared, is_stalled);
        }
        link.tend();
        let has_told = shared.leases.tell();
        let registered = register_all(shared, attachment, false);
        let pause = if registered.is_err() {
            retry = (retry * 2).min(shared.checked.options.backoff_max);
            retry
        } else {
            retry = shared.checked.options.backoff_min;
            // Look often at an engine that stalls, so that it is noticed when it goes on, and at one whose death only
            // its file lock shows, because that wakes nobody.
            let is_quiet = has_told && link.is_idle() && !is_stalled && !link.has_lock();
            if is_quiet { IDLE_EVERY } else { LOOK_EVERY }
        };
        if LifeWord::interpret(raw) == Life::Dead {
            continue;
        }
        wait_any_sliced(
            &[
                (&shared.control, seen),
                (life.futex(), raw),
                (link.engine.epoch().incarnation_word(), link.incarnation),
                (answers, answered),
                (left, left_before),
            ],
            Deadline::after(pause),
            SLICE,
        );
        if life.life() == Life::Dead {
            // The kernel wakes only one sleeper for each marked word: wake the callers' threads too.
            kvring_shm_abi::futex::wake_all(life.futex());
        }
    }
}

/// Logs each change between stalling and responding once, and counts the stalls. Callers do not depend on it: they look
/// at the stall clock themselves.
fn told_stall(shared: &Shared, is_stalled: bool) {
    if is_stalled {
        shared.changed_to(&Health::Stalled);
    } else {
        let (engine, role) = (&shared.checked.options.engine, shared.role.as_str());
        tracing::info!(%engine, role, "the kvring engine responds again");
    }
}

/// Makes the registrations that the engine has not yet answered through this attachment, and with `again` also those
/// that it has refused. An error means: try again later.
fn register_all(shared: &Shared, attachment: &Arc<Attachment>, again: bool) -> Result<(), CallError> {
    let nonce = attachment.link.nonce;
    for registered in shared.registrations() {
        // A refusal is an outcome too. A refused registration is made again only with the next attachment, whose engine
        // may have more room.
        let is_known = |outcome: &Outcome| outcome.nonce == nonce && (!again || outcome.namespace.is_ok());
        if registered.outcome().as_ref().is_some_and(is_known) {
            continue;
        }
        let namespace = match register(shared, attachment, &registered.record) {
            Err(RegisterError::Call(error)) => {
                tracing::debug!(%error, "registration not through yet");
                return Err(error);
            }
            namespace => namespace,
        };
        if let Err(error) = &namespace {
            tracing::error!(
                engine = %shared.checked.options.engine, reason = %error,
                "the kvring engine refused this KV cache: nothing of it is stored or found"
            );
        }
        failpoint::here(Place::ClientRegistered);
        let arena_id = attachment.identity.arena_id;
        *registered.outcome() = Some(Outcome { nonce, arena_id, namespace });
        shared.notify_changed();
    }
    Ok(())
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

/// Detaches, so that the engine frees everything at once. If it does not answer, giving the claim up has the same
/// effect.
fn leave(shared: &Shared, attachment: &Arc<Attachment>) {
    let link = &attachment.link;
    if !link.is_healthy() {
        return;
    }
    let _ = link.call(Request::Detach, shared.checked.options.drain_timeout);
}
