//! After a restart the keeper declares to the new engine what this client still holds, and the engine frees the rest.
//!
//! If anything goes wrong, the keeper begins again, with the same engine or the next. It declares all slots again, and of the
//! leases what it has not declared to that engine.

use crate::attachment::Attachment;
use crate::batch::{BatchId, Settled};
use crate::error::CallError;
use crate::leases::Piece;
use crate::link::{Link, Undo, slot_words, write_slots};
use crate::shared::Shared;
use crate::status;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{Records, Request, SlotRecord};
use std::sync::Arc;
use std::time::Duration;

/// The most slots in one message.
const SLOTS_PER_MESSAGE: usize = 512;

/// Drops the old channel before there is a new one. Answers that come late through it no longer count.
pub(crate) fn let_go(shared: &Shared) {
    drop(shared.ledger.begin_declaring());
    shared.leases.begin_declaring(None);
}

/// Declares every slot and lease, then sends `DeclareEnd`.
pub(crate) fn declare(shared: &Shared, attachment: &Attachment) -> Result<(), CallError> {
    let link = &attachment.link;
    let timeout = shared.checked.options.operation_timeout;
    // From here on no answer of an earlier engine counts any more.
    let slots = shared.ledger.begin_declaring();
    shared.leases.begin_declaring(Some(link.nonce));
    failpoint::here(Place::ClientTookStock);
    if shared.role == Role::Worker {
        for part in slots.chunks(slots_per_message(link)) {
            declare_slots(shared, link, part, timeout)?;
        }
    }
    // Lookups go on meanwhile: what they hold joins what is still to be declared.
    let ended = loop {
        while let Some(piece) = shared.leases.next_to_declare() {
            declare_piece(shared, link, &piece, timeout)?;
        }
        failpoint::here(Place::ClientDeclared);
        if let Some(ended) = shared.leases.end_declaring(link) {
            break ended?;
        }
    };
    status::check(&ended.wait(timeout)?.completion)
}

fn slots_per_message(link: &Link) -> usize {
    (link.payload().len() / 2 / slot_words(1)).clamp(1, SLOTS_PER_MESSAGE)
}

fn declare_slots(
    shared: &Shared,
    link: &Arc<Link>,
    slots: &[SlotRecord],
    timeout: Duration,
) -> Result<(), CallError> {
    let pending = link.submit(
        slot_words(slots.len()),
        |_| Undo::Nothing,
        |payload, region| {
            let (slots, answer) = write_slots(payload, region, slots);
            Request::DeclareSlots { slots, answer }
        },
    )?;
    let answer = pending.wait(timeout)?;
    status::check(&answer.completion)?;
    let [known, unknown, ..] = answer.completion.results;
    shared.counters.slots_declared.add(known);
    shared.counters.slots_lost.add(unknown);
    Ok(())
}

fn declare_piece(
    shared: &Shared,
    link: &Arc<Link>,
    piece: &Piece,
    timeout: Duration,
) -> Result<(), CallError> {
    let Piece { owed, name: (session, admission), namespace, first, words, is_last } = piece;
    // What has been released must not stand in the way of what is declared.
    owed.iter().for_each(|request| link.post_quietly(*request));
    let words: Vec<u64> = words.iter().map(|word| word.bits()).collect();
    let pending = link.submit(
        words.len(),
        // Nothing is undone if the answer comes too late: what was sent counts as declared to this attachment, and its
        // release is due as usual.
        |_| Undo::Nothing,
        |payload, region| {
            let written = payload.write(region.offset, &words);
            debug_assert!(written.is_ok());
            let chunks = Records { offset: region.offset, count: words.len() as u32 };
            let (session, admission, namespace, first) = (*session, *admission, *namespace, *first as u32);
            Request::Hold { session, admission, namespace, first, chunks }
        },
    );
    let pending = pending.inspect_err(|_| shared.leases.not_declared(piece))?;
    let answer = pending.wait(timeout)?;
    let there = match status::check(&answer.completion) {
        Ok(()) => usize::try_from(answer.completion.results[0]).unwrap_or(usize::MAX),
        Err(CallError::Busy | CallError::NotRegistered) => 0,
        Err(error) => return Err(error),
    };
    if there < words.len() {
        // Chunks that are not held again may be evicted; a load of such a chunk then fails its validation.
        shared.counters.leases_cut.add(1);
        shared.leases.declared_in_part(piece);
    } else if *is_last {
        shared.counters.leases_declared.add(1);
    }
    Ok(())
}

/// Makes the attachment the one that the ledger and the leases go by, and sends the releases, aborts and commits that
/// were decided while there was none. `rejoins`: the claim had been attached before, so this is counted as a
/// reattachment.
pub(crate) fn settle(shared: &Shared, attachment: &Attachment, rejoins: bool) {
    let link = &attachment.link;
    if !rejoins {
        shared.leases.attached(link);
    }
    let duties = shared.ledger.attached(link);
    if rejoins {
        shared.counters.reattachments.add(1);
    }
    link.post_abort(duties.aborts);
    for (batch, records) in duties.commits {
        // On an error the commit stays in the ledger, for the next engine.
        if let Err(error) = commit(shared, link, batch, &records) {
            tracing::debug!(%error, "a commit that outlived its engine is not through yet");
        }
    }
}

fn commit(
    shared: &Shared,
    link: &Arc<Link>,
    batch: BatchId,
    records: &[SlotRecord],
) -> Result<(), CallError> {
    let answer = link.commit(batch, records)?.0.wait(shared.checked.options.operation_timeout)?;
    status::check(&answer.completion)?;
    let settled = Settled::by(&answer.completion);
    shared.counters.late_commits.add(settled.done.into());
    shared.counters.late_commits_gone.add(settled.gone.into());
    shared.ledger.settle(batch, settled);
    Ok(())
}
