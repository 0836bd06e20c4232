//! A client made by hand from `shm-abi`: it can send anything, in any order, and keeps no promise.
//!
//! Its life word belongs to the thread that made it, and the kernel knows one robust list of each thread: so a client
//! dies only with its process. Dropping it gives its entry up.

use crate::kv::chain;
use crate::wait::{becomes, until};
use kvring_adapter::EngineView;
use kvring_rig::pages::{Pages, Shape};
use kvring_shm_abi::channel::Channel;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::life::RobustList;
use kvring_shm_abi::lobby::{CLIENTS_MAX, EntryContent, Lobby, Role};
use kvring_shm_abi::lookup::Marked;
use kvring_shm_abi::message::{
    Completion, DTYPE_BYTES, Ident, Key, MODEL_NAME_BYTES, Record, Records, Registration, Request,
    ReserveAnswer, ReserveOutcome, Round, SlotOutcome, SlotRecord, Status,
};
use kvring_shm_abi::park;
use kvring_shm_abi::payload::Payload;
use kvring_shm_abi::ring::{Body, Consumer, Producer};
use kvring_shm_abi::segment::{self, EngineName};

/// Words of a raw client's payload area.
pub const PAYLOAD_WORDS: u32 = 1 << 16;
/// Where its arguments begin; answers go to [`ANSWER_AT`].
const ARGUMENTS_AT: u32 = 0;
/// Where its answers go.
const ANSWER_AT: u32 = 1 << 15;

/// The client.
pub struct RawClient {
    name: EngineName,
    pub view: EngineView,
    pub lobby: Lobby,
    list: RobustList,
    pub entry: usize,
    pub nonce: u64,
    /// It signs its messages with this.
    pub ident: Ident,
    /// The writing end of its submissions.
    pub submissions: Producer,
    completions: Consumer,
    pub payload: Payload,
    pub channel: Channel,
    /// Its channel's file, for accesses that the types do not allow.
    pub file: std::fs::File,
    next_operation: u16,
}

/// A new channel of this many words for an entry, under a new nonce.
fn new_channel(name: &EngineName, view: &EngineView, entry: usize, payload_words: u32) -> (u64, Channel) {
    let nonce = kvring_shm_abi::superblock::random_u64().expect("random numbers");
    let identity = view.identity;
    let channel = Channel::create(name, entry, nonce, payload_words, identity.arena_id, identity.geometry);
    (nonce, channel.expect("a channel"))
}

/// A client that has claimed an entry and made a channel, and has not published the entry yet.
pub struct Claimed {
    client: RawClient,
    content: EntryContent,
}

impl Claimed {
    /// Claims a free entry and makes a channel for it.
    pub fn new(engine: &str, role: Role) -> Claimed {
        Claimed::with_payload(engine, role, PAYLOAD_WORDS)
    }

    /// The same with a payload area of this many words.
    pub fn with_payload(engine: &str, role: Role, payload_words: u32) -> Claimed {
        let name = EngineName::new(engine).expect("a good name");
        let view = EngineView::open(&name).unwrap_or_else(|error| panic!("the engine: {error}"));
        let lobby = view.open_lobby(&name).unwrap_or_else(|error| panic!("the lobby: {error}"));
        let mut list = RobustList::register(lobby.life_words.clone()).expect("robust lists");
        // The engine may not have reclaimed yet what others gave up a moment ago.
        let entry = until("an entry is free", || (0..CLIENTS_MAX).find(|entry| list.claim(*entry).is_ok()));
        let (nonce, channel) = new_channel(&name, &view, entry, payload_words);
        let path = std::path::Path::new("/dev/shm").join(name.client(entry, nonce).trim_start_matches('/'));
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("our own channel");
        let incarnation = view.segment.epoch().incarnation();
        let content = EntryContent {
            role: role as u32,
            nonce,
            incarnation,
            pid: std::process::id(),
            payload_words,
            name: "raw".to_owned(),
        };
        let client = RawClient {
            ident: Ident { incarnation, nonce: nonce as u32 },
            submissions: Producer::new(channel.submissions.clone()),
            completions: Consumer::new(channel.completions.clone()),
            payload: channel.payload.clone(),
            channel,
            file,
            next_operation: 0,
            name,
            view,
            lobby,
            list,
            entry,
            nonce,
        };
        Claimed { client, content }
    }

    pub fn entry(&self) -> usize {
        self.client.entry
    }

    pub fn file(&self) -> &std::fs::File {
        &self.client.file
    }

    /// Removes the channel before anybody has opened it.
    pub fn unlink_channel(&self) {
        segment::unlink(&self.client.name.client(self.client.entry, self.client.nonce));
    }

    /// Publishes the entry as changed, and waits for nothing.
    pub fn publish_only(mut self, change: impl FnOnce(&mut EntryContent)) -> RawClient {
        change(&mut self.content);
        self.client.lobby.claim(self.client.entry, &self.content);
        self.client
    }

    /// Publishes the entry, changed as told, and waits for the engine's answer.
    pub fn publish(mut self, change: impl FnOnce(&mut EntryContent)) -> Result<RawClient, AttachStatus> {
        change(&mut self.content);
        let client = self.client;
        client.lobby.claim(client.entry, &self.content);
        let status = client.judged(self.content.nonce);
        // As the adapter does: without a name it cannot be left behind.
        segment::unlink(&client.name.client(client.entry, client.nonce));
        if status == AttachStatus::Attached { Ok(client) } else { Err(status) }
    }
}

impl RawClient {
    /// Attaches as a well-behaved client would.
    pub fn attach(engine: &str, role: Role) -> RawClient {
        let attached = Claimed::new(engine, role).publish(|_| {});
        attached.unwrap_or_else(|status| panic!("refused: {status:?}"))
    }

    fn judged(&self, nonce: u64) -> AttachStatus {
        let record = &self.view.segment.attach[self.entry];
        until("the engine judges the claim", || {
            let status = record.read(nonce);
            (status != AttachStatus::None).then_some(status)
        })
    }

    /// How its attachment stands.
    pub fn status(&self) -> AttachStatus {
        self.view.segment.attach[self.entry].read(self.nonce)
    }

    /// Waits until the engine has detached it for a breach.
    pub fn is_thrown_out(&self, why: &str) {
        becomes(why, AttachStatus::Breach, || self.status());
    }

    /// Publishes its entry again without giving it up, with another nonce and another channel. Returns what the engine has
    /// said to that, if anything, when `meanwhile` has run.
    pub fn claim_again(&mut self, meanwhile: impl FnOnce()) -> AttachStatus {
        let (nonce, channel) = new_channel(&self.name, &self.view, self.entry, PAYLOAD_WORDS);
        self.nonce = nonce;
        let content = EntryContent {
            role: Role::Worker as u32,
            nonce: self.nonce,
            incarnation: self.ident.incarnation,
            pid: std::process::id(),
            payload_words: PAYLOAD_WORDS,
            name: "raw again".to_owned(),
        };
        self.ident.nonce = self.nonce as u32;
        self.submissions = Producer::new(channel.submissions.clone());
        self.completions = Consumer::new(channel.completions.clone());
        self.payload = channel.payload.clone();
        self.channel = channel;
        self.lobby.claim(self.entry, &content);
        meanwhile();
        self.status()
    }

    /// Gives the entry up without a message, as if its owner had died.
    pub fn give_up(&mut self) {
        self.list.release(self.entry);
    }

    /// Rings the engine's doorbell.
    pub fn ring(&self) {
        park::notify(self.lobby.doorbell());
    }

    pub fn send_body(&mut self, body: &Body) {
        self.submissions.push(body);
        self.ring();
    }

    /// Sends a request; returns its operation number.
    pub fn send(&mut self, request: Request) -> u16 {
        self.next_operation = (self.next_operation + 1) % 256;
        let operation = self.next_operation;
        self.send_body(&request.encode(operation, self.ident));
        operation
    }

    /// The next completion, if there is one.
    pub fn poll(&mut self) -> Option<Completion> {
        let body = self.completions.pop().expect("a ring that does not jump")?;
        Some(Completion::decode(&body).expect("a completion"))
    }

    /// Sends a request and waits for its completion.
    pub fn call(&mut self, request: Request) -> Completion {
        let operation = self.send(request);
        let completion = self.answer();
        assert_eq!(completion.operation, operation);
        completion
    }

    /// Waits for the next completion.
    pub fn answer(&mut self) -> Completion {
        let completion = until("the engine answers", || self.poll());
        assert_eq!(completion.ident, self.ident);
        completion
    }

    /// Registers one rank of namespace `namespace`; returns the namespace's id.
    pub fn register(&mut self, namespace: u64, world: u32, rank: u32, shard_bytes: u64) -> u32 {
        let completion = self.call_register(&registration(namespace, world, rank, shard_bytes));
        assert_eq!(completion.status, Status::Ok, "{completion:?}");
        completion.results[0] as u32
    }

    /// Registers whatever it is.
    pub fn call_register(&mut self, registration: &Registration) -> Completion {
        let request = self.register_request(registration);
        self.call(request)
    }

    /// A registration.
    pub fn register_request(&self, registration: &Registration) -> Request {
        self.payload.write(ARGUMENTS_AT, bytemuck::cast_slice(&[*registration])).expect("room");
        Request::Register { record: ARGUMENTS_AT }
    }

    /// A reservation of these keys.
    pub fn reserve_request(&self, namespace: u32, rank: u32, round: Round, keys: &[Key]) -> Request {
        let _ = self.payload.write(ARGUMENTS_AT, bytemuck::cast_slice(keys));
        let keys = Records { offset: ARGUMENTS_AT, count: keys.len() as u32 };
        Request::Reserve { round, namespace, rank, keys, answer: ANSWER_AT, parent: None }
    }

    /// Reserves; returns the slots to write, for a commit or an abort.
    pub fn reserve(&mut self, namespace: u32, rank: u32, round: Round, keys: &[Key]) -> Vec<SlotRecord> {
        let completion = self.call(self.reserve_request(namespace, rank, round, keys));
        assert_eq!(completion.status, Status::Ok, "{completion:?}");
        let answers = self.read::<ReserveAnswer>(ANSWER_AT, keys.len());
        let granted =
            keys.iter().zip(answers).filter(|(_, answer)| answer.outcome() == Some(ReserveOutcome::Write));
        granted
            .map(|(key, answer)| SlotRecord {
                slot: u64::from(answer.shard.slot()),
                generation: answer.shard.generation,
                key: *key,
                checksum: 0,
            })
            .collect()
    }

    /// Reserves slots until none is left; returns those that it got.
    pub fn take_all(&mut self, namespace: u32, name: u64) -> Vec<SlotRecord> {
        let mut taken = Vec::new();
        for part in 0.. {
            let granted = self.reserve(namespace, 0, Round { source: 99, number: 1 }, &chain(name + part, 8));
            taken.extend(&granted);
            if granted.len() < 8 {
                break;
            }
        }
        taken
    }

    /// Commits or aborts slots; returns what became of each.
    pub fn finish(&mut self, slots: &[SlotRecord], commit: bool) -> Vec<SlotOutcome> {
        self.outcomes(slots, |slots| match commit {
            true => Request::Commit { slots, answer: ANSWER_AT },
            false => Request::Abort { slots, answer: ANSWER_AT },
        })
    }

    /// Declares slots; returns what became of each.
    pub fn declare(&mut self, slots: &[SlotRecord]) -> Vec<SlotOutcome> {
        self.outcomes(slots, |slots| Request::DeclareSlots { slots, answer: ANSWER_AT })
    }

    fn outcomes(
        &mut self,
        slots: &[SlotRecord],
        request: impl FnOnce(Records) -> Request,
    ) -> Vec<SlotOutcome> {
        self.payload.write(ARGUMENTS_AT, bytemuck::cast_slice(slots)).expect("room");
        let completion = self.call(request(Records { offset: ARGUMENTS_AT, count: slots.len() as u32 }));
        assert_eq!(completion.status, Status::Ok, "{completion:?}");
        let mut words = vec![0u64; slots.len()];
        self.payload.read(ANSWER_AT, &mut words).expect("room");
        words.into_iter().map(|word| SlotOutcome::from_number(word).expect("an outcome")).collect()
    }

    /// Says that a shard is damaged; returns what became of that.
    pub fn invalidate(&mut self, record: SlotRecord) -> SlotOutcome {
        let SlotRecord { slot, generation, key, .. } = record;
        let completion = self.call(Request::Invalidate { slot: slot as u32, generation, key });
        assert_eq!(completion.status, Status::Ok, "{completion:?}");
        SlotOutcome::from_number(completion.results[0]).expect("an outcome")
    }

    /// A hold of these chunks, behind the first `first` of the lease.
    pub fn hold_request(
        &self,
        session: u64,
        admission: u32,
        namespace: u32,
        first: u32,
        chunks: &[ChunkWord],
    ) -> Request {
        let words: Vec<u64> = chunks.iter().map(|word| word.bits()).collect();
        let _ = self.payload.write(ARGUMENTS_AT, &words);
        let chunks = Records { offset: ARGUMENTS_AT, count: words.len() as u32 };
        Request::Hold { session, admission, namespace, first, chunks }
    }

    /// The longest prefix of these keys that is there now, which nobody holds for that.
    pub fn search(&self, namespace: u32, keys: &[Key]) -> Vec<ChunkWord> {
        let mut found = Vec::new();
        let keys = keys.iter().copied();
        self.view.segment.chunks.search(namespace, keys, usize::MAX, Marked::Missing, &mut found);
        found
    }

    /// A hold of what is there of these keys.
    pub fn hold_found(&self, session: u64, admission: u32, namespace: u32, keys: &[Key]) -> Request {
        self.hold_request(session, admission, namespace, 0, &self.search(namespace, keys))
    }

    fn read<T: Record>(&self, offset: u32, count: usize) -> Vec<T> {
        let mut records = vec![<T as bytemuck::Zeroable>::zeroed(); count];
        self.payload.read(offset, bytemuck::cast_slice_mut(&mut records)).expect("room");
        records
    }
}

/// A good registration.
pub fn registration(namespace: u64, world: u32, rank: u32, shard_bytes: u64) -> Registration {
    let pages = Pages::new(Shape { blocks: 4, ..Shape::SMALL }).expect("a shape that can be");
    // SAFETY: no adapter gets it.
    let paged = unsafe { pages.describe() }.expect("a cache that an adapter takes");
    Registration {
        fingerprint: crate::proto::fingerprint(namespace),
        // What a worker of this shape says, so that both can be ranks of one namespace.
        layout: paged.layout_digest(),
        shard_bytes,
        world,
        rank,
        chunk_tokens: 64,
        reserved: 0,
        model: [b'm'; MODEL_NAME_BYTES],
        dtype: [0; DTYPE_BYTES],
    }
}
