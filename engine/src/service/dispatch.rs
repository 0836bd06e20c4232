//! Requests: copied out once, checked, done, answered.
//!
//! There are three ways to be wrong. A request that this client may not make, or that cannot be met, is answered with a
//! status. One that was meant for another attachment is ignored. One that no correct client can send (an unknown opcode, a
//! range outside the payload area, a ring that jumps) is a breach: the client is detached and nobody else notices.
//!
//! A request of many keys is done in pieces, a slice of work each time it is this client's turn. Its arguments are copied
//! out piece by piece, each piece once. Meanwhile no other request of its client is taken, so none can overtake it.

use super::done::{Done, OK, PIECE, refuse};
use super::hold::HoldRequest;
use super::store::{Finish, FinishSlots, ReserveMessage, ReserveRequest};
use super::{BATCH, SLICE, Service};
use crate::stats::Stat;
use kvring_shm_abi::failpoint::{self, Place, Rule};
use kvring_shm_abi::message::{ANY_NAMESPACE, Completion, Ident, Key, Request, SlotRecord, Status};
use kvring_shm_abi::payload::OutOfArea;

/// Memory for a piece of one request's arguments, taken at start.
pub(super) struct Scratch {
    pub(super) keys: Box<[Key]>,
    pub(super) slots: Box<[SlotRecord]>,
    pub(super) words: Box<[u64]>,
}

impl Scratch {
    pub(super) fn new() -> Scratch {
        Scratch {
            keys: vec![[0; 2]; PIECE].into_boxed_slice(),
            slots: vec![<SlotRecord as bytemuck::Zeroable>::zeroed(); PIECE].into_boxed_slice(),
            words: vec![0; PIECE].into_boxed_slice(),
        }
    }
}

/// A request that is being done, and how far it has come.
#[derive(Clone, Copy)]
pub(super) struct Doing {
    operation: u16,
    what: What,
}

impl Doing {
    /// Does it wait for room, as long as the cache waits until the engine has listened to all schedulers?
    fn waits(&self) -> bool {
        matches!(self.what, What::Reserve(_))
    }
}

/// The requests that take more than a moment.
#[derive(Clone, Copy)]
enum What {
    Hold(HoldRequest),
    Release { session: u64, admission: u32, keep: u32 },
    EndSession { session: u64 },
    Reserve(ReserveRequest),
    Finish(FinishSlots),
    DeclareEnd { freed: u32 },
}

impl Service {
    /// One client's turn: a slice of work, and at most [`BATCH`] requests. True when there was something to do.
    #[inline]
    pub(super) fn serve(&mut self, entry: usize) -> bool {
        let (mut worked, mut taken) = (false, 0);
        self.cache.allow(SLICE);
        for _ in 0..BATCH {
            if self.cache.is_spent() {
                break;
            }
            let Some(connection) = self.entries[entry].connection_mut() else { break };
            if let Some(doing) = connection.doing.take() {
                if doing.waits() && self.cache.is_waiting() {
                    connection.doing = Some(doing);
                    break;
                }
                worked = true;
                self.go_on(entry, doing);
                continue;
            }
            let Some(connection) = self.entries[entry].connection_mut() else { break };
            let body = match connection.pop() {
                Ok(Some(body)) => body,
                Ok(None) => break,
                Err(jump) => {
                    self.breach(entry, &jump);
                    return true;
                }
            };
            worked = true;
            taken += 1;
            let expected = connection.ident;
            match Request::decode(&body) {
                Ok((operation, ident, request)) if ident == expected => {
                    self.request(entry, operation, ident, &request);
                }
                // Meant for another attachment: ignored.
                Ok(_) => self.stat(Stat::StaleRequests, 1),
                Err(malformed) => self.breach(entry, &malformed),
            }
        }
        if worked && self.entries[entry].connection_mut().is_some_and(|connection| connection.announce()) {
            self.stat(Stat::Wakes, 1);
        }
        self.heard_from(entry, taken);
        worked
    }

    #[inline(always)]
    fn request(&mut self, entry: usize, operation: u16, ident: Ident, request: &Request) {
        self.stat(Stat::Requests, 1);
        self.cache.spend(1);
        if self.unhealthy && !matches!(request, Request::Detach | Request::Noop) {
            return self.complete(entry, operation, Status::Busy, [0; 4]);
        }
        let what = match *request {
            Request::Noop => Err(Ok(OK)),
            Request::Detach => {
                self.complete(entry, operation, Status::Ok, [0; 4]);
                if let Some(connection) = self.entries[entry].connection_mut() {
                    connection.announce();
                }
                self.leave(entry);
                return;
            }
            Request::Hold { session, admission, namespace, first, chunks } => {
                self.begin_hold(entry, session, admission, namespace, first, chunks).map(What::Hold)
            }
            Request::Release { session, admission, keep } => Ok(What::Release { session, admission, keep }),
            Request::EndSession { session } => Ok(What::EndSession { session }),
            Request::Register { record } => {
                Err(self.register(entry, record).map(|(s, r)| Done::Answer(s, r)))
            }
            Request::Unregister { namespace } => Err(Ok(self.unregister(entry, namespace))),
            Request::Reserve { round, namespace, rank, keys, answer, parent } => {
                let message = ReserveMessage { round, namespace, rank, keys, answer, parent };
                self.begin_reserve(entry, message).map(What::Reserve)
            }
            Request::Commit { slots, answer } => {
                self.begin_slots(entry, slots, answer, Finish::Commit).map(What::Finish)
            }
            Request::Abort { slots, answer } => {
                self.begin_slots(entry, slots, answer, Finish::Abort).map(What::Finish)
            }
            Request::DeclareSlots { slots, answer } => {
                self.begin_slots(entry, slots, answer, Finish::Declare).map(What::Finish)
            }
            Request::Clear { namespace } => {
                let which = (namespace != ANY_NAMESPACE).then_some(namespace);
                Err(Ok(if which.is_some_and(|id| self.registry.get(id).is_none()) {
                    refuse(Status::UnknownNamespace)
                } else if self.begin_clear(entry, operation, ident, which) {
                    Done::Later
                } else {
                    refuse(Status::Busy)
                }))
            }
            Request::DeclareEnd => Ok(What::DeclareEnd { freed: 0 }),
            Request::Invalidate { slot, generation, key } => {
                Err(Ok(self.invalidate(entry, slot, generation, key)))
            }
        };
        match what {
            // As if its client's slice had just been spent.
            Ok(what) if failpoint::broken(Rule::BeginAtOnce) => {
                self.cache.allow(0);
                self.put_off(entry, Doing { operation, what });
            }
            Ok(what) => self.go_on(entry, Doing { operation, what }),
            Err(ended) => self.ended(entry, operation, ended),
        }
    }

    /// Does the next piece of a request, which then is answered or put off.
    #[inline]
    fn go_on(&mut self, entry: usize, mut doing: Doing) {
        let operation = doing.operation;
        let done = match &mut doing.what {
            What::Hold(hold) => self.hold(entry, hold),
            What::Release { session, admission, keep } => {
                let done = self.cache.release(entry as u8, *session, *admission, *keep);
                Ok(if done { OK } else { Done::More })
            }
            What::EndSession { session } => {
                Ok(if self.cache.end_session(entry as u8, *session) { OK } else { Done::More })
            }
            What::Reserve(reserve) => self.reserve(entry, reserve),
            What::Finish(finish) => self.finish_slots(entry, finish),
            What::DeclareEnd { freed } => Ok(self.declare_end(entry, freed)),
        };
        match done {
            Ok(Done::More) => self.put_off(entry, doing),
            ended => self.ended(entry, operation, ended),
        }
    }

    fn put_off(&mut self, entry: usize, doing: Doing) {
        if let Some(connection) = self.entries[entry].connection_mut() {
            connection.doing = Some(doing);
        }
        failpoint::here(Place::RequestPutOff);
    }

    #[inline]
    fn ended(&mut self, entry: usize, operation: u16, done: Result<Done, OutOfArea>) {
        match done {
            Ok(Done::Answer(status, results)) => self.complete(entry, operation, status, results),
            Ok(Done::Later | Done::Answered | Done::More) => {}
            Err(breach) => self.breach(entry, &breach),
        }
    }

    /// Publishes a completion.
    #[inline]
    pub(super) fn complete(&mut self, entry: usize, operation: u16, status: Status, results: [u64; 4]) {
        if let Some(connection) = self.entries[entry].connection_mut() {
            let ident = connection.ident;
            connection.push(&Completion { operation, ident, status, results });
        }
    }

    fn unregister(&mut self, entry: usize, namespace: u32) -> Done {
        let forgot = self.entries[entry].connection_mut().is_some_and(|c| c.forget_rank(namespace));
        if forgot { OK } else { refuse(Status::UnknownNamespace) }
    }
}
