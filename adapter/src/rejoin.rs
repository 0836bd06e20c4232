//! After a restart: what this client still holds is named to the new engine, which frees the rest. On the keeper's thread.
//!
//! Repeatable: it is done again, from the start, after anything that went wrong, with this engine or the next.

use crate::attachment::Attachment;
use crate::batch::{BatchId, Settled};
use crate::error::CallError;
use crate::leases::Lease;
use crate::link::{Link, Undo, slot_words, write_slots};
use crate::shared::Shared;
use crate::status;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{LeaseRecord, Record, Records, Request, SlotRecord};
use std::sync::Arc;
use std::time::Duration;

/// Slots in one message.
const SLOTS_PER_MESSAGE: usize = 512;

/// Lets go of the old channel, before there is a new one. Late answers are not waited for any longer.
pub(crate) fn let_go(shared: &Shared) {
    drop(shared.ledger.begin_declaring());
    drop(shared.leases.begin_declaring());
}

/// Names everything, then says that this was all.
pub(crate) fn declare(shared: &Shared, attachment: &Attachment) -> Result<(), CallError> {
    let link = &attachment.link;
    let timeout = shared.checked.options.operation_timeout;
    // From here on nothing counts that the earlier engine may still be heard to say.
    let slots = shared.ledger.begin_declaring();
    let leases = shared.leases.begin_declaring();
    failpoint::here(Place::ClientTookStock);
    if shared.role == Role::Worker {
        for part in slots.chunks(slots_per_message(link)) {
            declare_slots(shared, link, part, timeout)?;
        }
    }
    for lease in &leases {
        declare_lease(shared, link, lease, timeout)?;
    }
    failpoint::here(Place::ClientDeclared);
    link.call(Request::DeclareEnd, timeout)?;
    Ok(())
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

fn declare_lease(
    shared: &Shared,
    link: &Arc<Link>,
    lease: &Lease,
    timeout: Duration,
) -> Result<(), CallError> {
    let wanted = lease.keep.min(lease.found.keys.len() as u32) as usize;
    // A lease that does not fit is kept as far as it does: its prefix is what is loaded first.
    let count = wanted.min(link.payload().len() / 2 / LeaseRecord::WORDS);
    let records: Vec<LeaseRecord> = (0..count).map(|chunk| lease.found.record(chunk)).collect();
    let (session, admission, namespace) = (lease.session, lease.admission, lease.namespace);
    let pending = link.submit(
        count * LeaseRecord::WORDS,
        // An answer that comes too late is nothing to undo: the next attempt names the lease again, and what has been
        // released by then is owed.
        |_| Undo::Nothing,
        |payload, region| {
            let written = payload.write(region.offset, bytemuck::cast_slice(&records));
            debug_assert!(written.is_ok());
            let chunks = Records { offset: region.offset, count: count as u32 };
            Request::DeclareLease { session, admission, namespace, chunks }
        },
    )?;
    let answer = pending.wait(timeout)?;
    match status::check(&answer.completion) {
        Ok(()) if answer.completion.results[0] as usize >= wanted => shared.counters.leases_declared.add(1),
        // What is not pinned may be evicted; a load of it then fails its check.
        Ok(()) | Err(CallError::Busy | CallError::NotRegistered) => shared.counters.leases_cut.add(1),
        Err(error) => return Err(error),
    }
    Ok(())
}

/// The attachment stands: what was decided while there was none is done. Where `rejoins`, the earlier engine's slots too.
pub(crate) fn settle(shared: &Shared, attachment: &Attachment, rejoins: bool) {
    let link = &attachment.link;
    shared.leases.attached(link);
    let duties = shared.ledger.attached(link);
    if rejoins {
        shared.counters.reattachments.add(1);
    }
    link.post_abort(duties.aborts);
    for (batch, records) in duties.commits {
        // Not through: it stays in the ledger, for the next engine.
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
