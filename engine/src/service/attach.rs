//! The lobby: clients that come, leave, or die.
//!
//! A claimed life word is a claim, whatever its owner managed to do afterwards. Only this module turns a dead word back
//! to 0, and only after it has reclaimed everything: leases, reservations, channel, entry. (Where devices write for a client,
//! that may be long after its death: see `linger`.)

use super::connection::{Claim, Connection};
use super::entry::{Entry, Then};
use super::{Service, Watched};
use crate::cache::Leaving;
use crate::segments::files;
use crate::stats::Stat;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::failpoint::{self, Place, Rule};
use kvring_shm_abi::life::{Life, LifeWord};
use kvring_shm_abi::lobby::{CLIENTS_MAX, Role};
use kvring_shm_abi::segment;

/// Claims that are judged, and dead clients that are buried, in one look around the lobby.
const COMING_AND_GOING: u32 = 8;

impl Service {
    /// Has anything changed in the lobby since the last look around it? Compares the watched life words and the count of
    /// claims, not every entry: the next tick finds an entry that was claimed but never published.
    #[inline]
    pub(super) fn lobby_has_news(&self) -> bool {
        let lobby = &self.segments.lobby;
        lobby.claims() != self.claims
            || self.watched.iter().any(|watched| lobby.life_words[watched.entry].raw() != watched.raw)
    }

    /// Looks at every entry of the lobby. To judge a claim or to bury a dead client takes system calls, so one look does at
    /// most [`COMING_AND_GOING`] of them; the others stay news for the next look, which begins with them.
    pub(super) fn look_around(&mut self) {
        // The count is read first, so that a claim made meanwhile is news again.
        self.claims = self.segments.lobby.claims();
        self.watched.clear();
        let mut left = COMING_AND_GOING;
        let mut put_off = None;
        for entry in (self.look_from..CLIENTS_MAX).chain(0..self.look_from) {
            match self.entries[entry] {
                // Its life word is looked at when the parting is over, whatever it says by now.
                Entry::Parting(_) => continue,
                Entry::Lingering(_) => {
                    self.look_at_lingering(entry);
                    continue;
                }
                Entry::Free | Entry::Outdated { .. } | Entry::Attached(_) | Entry::Over => {}
            }
            let word = &self.segments.lobby.life_words[entry];
            let raw = word.raw();
            failpoint::here(Place::LookWord);
            match LifeWord::interpret(raw) {
                Life::Unclaimed if !self.is_known(entry) => {}
                // The engine knows an owner of this entry, and yet the word is unclaimed: somebody wrote 0 into it, so the
                // kernel will never mark that owner as dead. It counts as dead; but like the kernel's mark, that does not
                // say that its process has ended. The mark is made here, by a compare-and-swap. Where that fails a newcomer
                // has claimed the word, what the entry says may be the newcomer's, and it is left alone.
                Life::Unclaimed if !failpoint::broken(Rule::MarkBeforeBurying) && !word.mark_dead(raw) => {}
                Life::Unclaimed | Life::Dead => {
                    if left == 0 {
                        put_off.get_or_insert(entry);
                        continue;
                    }
                    left -= 1;
                    self.bury(entry);
                }
                Life::Alive { .. } => {
                    self.watched.push(Watched { entry, raw });
                    if !self.is_to_be_judged(entry) {
                        continue;
                    }
                    if left == 0 {
                        put_off.get_or_insert(entry);
                        continue;
                    }
                    // A claim that could not be read took no system call. It is looked at again.
                    left -= u32::from(self.judge(entry));
                }
            }
        }
        if let Some(entry) = put_off {
            self.look_from = entry;
            self.look_again();
        }
    }

    /// Makes [`Self::lobby_has_news`] true, for news that no life word and no new claim shows.
    pub(super) fn look_again(&mut self) {
        self.claims = self.segments.lobby.claims().wrapping_sub(1);
    }

    /// Has a client published a claim in this entry that has not been judged?
    fn is_to_be_judged(&self, entry: usize) -> bool {
        let nonce = self.segments.lobby.entries[entry].read_nonce();
        match self.entries[entry] {
            Entry::Free => nonce.is_some(),
            Entry::Outdated { nonce: before } => {
                nonce.is_some() && (nonce != Some(before) || failpoint::broken(Rule::OutdatedClaims))
            }
            _ => false,
        }
    }

    /// May there be something to take back from a client that claimed this entry? Also where the entry says that devices
    /// write for it: an earlier engine may have granted them slots, and has not reclaimed those, because it would have
    /// cleared the entry before it reset the life word.
    fn is_known(&self, entry: usize) -> bool {
        matches!(self.entries[entry], Entry::Attached(_) | Entry::Over)
            || self.awaited.entries >> entry & 1 == 1
            || self.segments.lobby.entries[entry].dma().is_some()
    }

    /// Attaches the client in `entry`, or answers why not. Each claim is judged once; one that was meant for another engine
    /// does not count, because its owner publishes another. False where the claim could not be read.
    fn judge(&mut self, entry: usize) -> bool {
        let Some(content) = self.segments.lobby.entries[entry].read() else { return false };
        let incarnation = self.segments.engine.epoch().incarnation();
        let (status, state) = match Role::from_number(content.role.into()) {
            None => (AttachStatus::BadRole, Entry::Over),
            Some(_) if content.incarnation != incarnation => {
                (AttachStatus::Stale, Entry::Outdated { nonce: content.nonce })
            }
            Some(role) => {
                let claim = Claim {
                    entry,
                    role,
                    nonce: content.nonce,
                    incarnation,
                    payload_words: content.payload_words,
                    name: content.name.clone(),
                };
                match Connection::open(self.segments.name(), claim) {
                    Ok(connection) => (AttachStatus::Attached, Entry::Attached(connection)),
                    Err(error) => {
                        tracing::warn!(entry, client = %content.name, %error, "cannot open the client's channel");
                        (AttachStatus::BadChannel, Entry::Over)
                    }
                }
            }
        };
        self.becomes(entry, state);
        if status == AttachStatus::Attached {
            let role = Role::from_number(content.role.into()).map_or("", Role::as_str);
            tracing::info!(entry, client = %content.name, role, pid = content.pid, "client attached");
            self.stat(Stat::Attaches, 1);
            if self.awaited.entries >> entry & 1 == 1 {
                self.stat(Stat::Reattachments, 1);
            }
        } else {
            tracing::warn!(entry, client = %content.name, reason = status.as_str(), "client refused");
            self.stat(Stat::Refusals, 1);
        }
        failpoint::here(Place::AttachAnswer);
        self.segments.engine.attach[entry].answer(content.nonce, status);
        failpoint::here(Place::AttachAnswered);
        true
    }

    /// The client asked to leave: everything it had is freed; its entry stays taken until the life word is marked.
    pub(super) fn leave(&mut self, entry: usize) {
        let Some(connection) = self.disconnect(entry) else { return };
        let nonce = connection.nonce;
        tracing::info!(entry, client = %connection.name, "client left");
        self.begin_parting(
            entry,
            Leaving::Left { nonce },
            Then::Answer { nonce, status: AttachStatus::Left },
        );
    }

    /// The client broke the protocol: its requests are no longer read. The slots that it may still write stay WRITING until it
    /// dies or gives its entry up.
    pub(super) fn breach(&mut self, entry: usize, reason: &dyn core::fmt::Display) {
        let Some(connection) = self.disconnect(entry) else { return };
        let nonce = connection.nonce;
        tracing::error!(entry, client = %connection.name, %reason, "client broke the protocol; detached");
        self.begin_parting(
            entry,
            Leaving::Detached { nonce },
            Then::Answer { nonce, status: AttachStatus::Breach },
        );
    }

    /// Takes the connection of this entry's client away, if it has one.
    fn disconnect(&mut self, entry: usize) -> Option<Connection> {
        self.entries[entry].connection()?;
        match self.becomes(entry, Entry::Over) {
            Entry::Attached(connection) => Some(connection),
            _ => None,
        }
    }

    /// The owner of this entry is dead, or has given it up: everything that it had is freed in pieces; then the entry may be
    /// claimed again.
    pub(super) fn reclaim(&mut self, entry: usize) {
        self.hang_up(entry, "client died; its leases and reservations are freed");
        if failpoint::broken(Rule::ReclaimBeforeReset) {
            self.segments.lobby.life_words[entry].reset();
        }
        failpoint::here(Place::ReclaimSlots);
        // This also frees slots that stayed WRITING when it was detached, and those from an earlier engine.
        self.begin_parting(entry, Leaving::Gone, Then::Free);
    }

    /// Nothing is left of the owner of this entry: clears the entry, then resets its life word.
    pub(super) fn reclaimed(&mut self, entry: usize) {
        self.no_longer_awaited(entry);
        failpoint::here(Place::ReclaimEntry);
        self.segments.lobby.forget_lookups(entry);
        self.segments.lobby.entries[entry].clear();
        failpoint::here(Place::ReclaimWord);
        // Last: from here on another client may claim it.
        if !failpoint::broken(Rule::ResetTheWord) {
            self.segments.lobby.life_words[entry].reset();
        }
        failpoint::here(Place::ReclaimDone);
    }

    /// Closes the channel of this entry's client, which is marked dead, and unlinks its file.
    pub(super) fn hang_up(&mut self, entry: usize, what: &str) {
        let connection = self.disconnect(entry);
        let name = self.segments.name();
        match &connection {
            // Usually gone already: a client unlinks its channel as soon as both sides have it.
            Some(connection) => segment::unlink(&name.client(entry, connection.nonce)),
            // It may have died before it said which channel it had made.
            None => files::unlink_channels_of(name, entry),
        }
        if let Some(connection) = connection {
            // It is still attached, so it has died without leaving.
            self.stat(Stat::Deaths, 1);
            tracing::warn!(entry, client = %connection.name, "{what}");
            // A client that lives, because it was not the kernel that changed its word, sees this answer and attaches again.
            self.segments.engine.attach[entry].answer(connection.nonce, AttachStatus::Left);
        }
    }
}
