//! A client made by hand from `shm-abi`: it can say anything, in any order, and promise nothing.
//!
//! Its life words belong to the thread that made it, and a thread has one robust list that the kernel knows: to let one
//! *die*, let its process die. Dropping one gives its entry up.

use crate::kv::{Kv, Shape, chain};
use crate::wait::{becomes, eventually};
use kvring_adapter::EngineView;
use kvring_shm_abi::channel::Channel;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::life::RobustList;
use kvring_shm_abi::lobby::{CLIENTS_MAX, EntryContent, Lobby, Role};
use kvring_shm_abi::message::{
    Completion, DTYPE_BYTES, Ident, Key, LeaseRecord, MODEL_NAME_BYTES, Record, Records, Registration,
    Request, ReserveAnswer, ReserveOutcome, Round, ShardAnswer, SlotOutcome, SlotRecord, Status,
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

/// The attachment, step by step.
pub struct RawClient {
    name: EngineName,
    /// The engine's segment.
    pub view: EngineView,
    /// The lobby.
    pub lobby: Lobby,
    list: RobustList,
    /// Its entry.
    pub entry: usize,
    /// Its nonce.
    pub nonce: u64,
    /// What its messages are signed with.
    pub ident: Ident,
    /// The writing end of its submissions.
    pub submissions: Producer,
    completions: Consumer,
    /// Its payload area.
    pub payload: Payload,
    /// Its channel's file: for what the types do not allow.
    pub file: std::fs::File,
    next_operation: u16,
}

/// Where a channel lies.
fn channel_path(engine: &EngineName, entry: usize, nonce: u64) -> std::path::PathBuf {
    std::path::Path::new("/dev/shm").join(engine.client(entry, nonce).trim_start_matches('/'))
}

/// An entry claimed, and a channel made: what comes before `publish`.
pub struct Claimed {
    client: RawClient,
    content: EntryContent,
}

impl Claimed {
    /// Claims a free entry and makes a channel for it.
    ///
    /// # Panics
    /// When the engine is not there, or its table is full.
    #[must_use]
    pub fn new(engine: &str, role: Role) -> Claimed {
        Claimed::with_payload(engine, role, PAYLOAD_WORDS)
    }

    /// The same, with a payload area of so many words.
    ///
    /// # Panics
    /// As `new`.
    #[must_use]
    pub fn with_payload(engine: &str, role: Role, payload_words: u32) -> Claimed {
        let name = EngineName::new(engine).expect("a good name");
        let view = EngineView::open(&name).unwrap_or_else(|error| panic!("the engine: {error}"));
        let lobby = view.open_lobby(&name).unwrap_or_else(|error| panic!("the lobby: {error}"));
        let mut list = RobustList::register(lobby.life_words.clone()).expect("robust lists");
        let mut entry = None;
        // Those who gave theirs up a moment ago may not have been reclaimed yet.
        eventually("an entry is free", || {
            entry = (0..CLIENTS_MAX).find(|entry| list.claim(*entry).is_ok());
            entry.is_some()
        });
        let entry = entry.expect("just claimed");
        let nonce = kvring_shm_abi::superblock::random_u64().expect("random numbers");
        let identity = view.identity;
        let channel =
            Channel::create(&name, entry, nonce, payload_words, identity.arena_id, identity.geometry)
                .expect("a channel");
        let path = channel_path(&name, entry, nonce);
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

    /// The entry.
    #[must_use]
    pub fn entry(&self) -> usize {
        self.client.entry
    }

    /// The channel's file.
    #[must_use]
    pub fn file(&self) -> &std::fs::File {
        &self.client.file
    }

    /// Removes the channel before anybody has opened it.
    pub fn unlink_channel(&self) {
        segment::unlink(&self.client.name.client(self.client.entry, self.client.nonce));
    }

    /// Publishes the entry as changed, and waits for nothing.
    #[must_use]
    pub fn publish_only(mut self, change: impl FnOnce(&mut EntryContent)) -> RawClient {
        change(&mut self.content);
        self.client.lobby.claim(self.client.entry, &self.content);
        self.client
    }

    /// Publishes the entry, changed as told, and waits for the engine's answer.
    ///
    /// # Errors
    /// What the engine said instead of "attached".
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
    ///
    /// # Panics
    /// When the engine refuses.
    #[must_use]
    pub fn attach(engine: &str, role: Role) -> RawClient {
        let attached = Claimed::new(engine, role).publish(|_| {});
        attached.unwrap_or_else(|status| panic!("refused: {status:?}"))
    }

    fn judged(&self, nonce: u64) -> AttachStatus {
        let record = &self.view.segment.attach[self.entry];
        eventually("the engine judges the claim", || record.read(nonce) != AttachStatus::None);
        record.read(nonce)
    }

    /// How its attachment stands.
    #[must_use]
    pub fn status(&self) -> AttachStatus {
        self.view.segment.attach[self.entry].read(self.nonce)
    }

    /// Waits until the engine has detached it for a breach.
    pub fn is_thrown_out(&self, why: &str) {
        becomes(why, AttachStatus::Breach, || self.status());
    }

    /// A further claim on the same entry, without giving it up: another nonce, another channel. What the engine says to
    /// it, if anything, while `meanwhile` runs.
    ///
    /// # Panics
    /// When no channel can be made.
    pub fn claim_again(&mut self, meanwhile: impl FnOnce()) -> AttachStatus {
        self.nonce = kvring_shm_abi::superblock::random_u64().expect("random numbers");
        let identity = self.view.identity;
        let (arena_id, geometry) = (identity.arena_id, identity.geometry);
        let channel = Channel::create(&self.name, self.entry, self.nonce, PAYLOAD_WORDS, arena_id, geometry)
            .expect("a channel");
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
        self.lobby.claim(self.entry, &content);
        meanwhile();
        self.status()
    }

    /// Gives the entry up without a word, as if its owner had died.
    pub fn give_up(&mut self) {
        self.list.release(self.entry);
    }

    /// Rings the engine's doorbell.
    pub fn ring(&self) {
        park::notify(self.lobby.doorbell());
    }

    /// Sends anything.
    pub fn send_body(&mut self, body: &Body) {
        self.submissions.push(body);
        self.ring();
    }

    /// Sends a request; its operation number.
    pub fn send(&mut self, request: Request) -> u16 {
        self.next_operation = (self.next_operation + 1) % 256;
        let operation = self.next_operation;
        self.send_body(&request.encode(operation, self.ident));
        operation
    }

    /// The next completion, if there is one.
    ///
    /// # Panics
    /// When the engine's ring makes no sense.
    pub fn poll(&mut self) -> Option<Completion> {
        let body = self.completions.pop().expect("a ring that does not jump")?;
        Some(Completion::decode(&body).expect("a completion"))
    }

    /// Sends a request and waits for its completion.
    ///
    /// # Panics
    /// When there is none.
    pub fn call(&mut self, request: Request) -> Completion {
        let operation = self.send(request);
        let completion = self.answer();
        assert_eq!(completion.operation, operation);
        completion
    }

    /// Waits for the next completion.
    ///
    /// # Panics
    /// When it is of another life.
    pub fn answer(&mut self) -> Completion {
        let mut completion = None;
        eventually("the engine answers", || {
            completion = self.poll();
            completion.is_some()
        });
        let completion = completion.expect("just seen");
        assert_eq!(completion.ident, self.ident);
        completion
    }

    /// Registers one rank of namespace `namespace`; its id.
    ///
    /// # Panics
    /// When the engine refuses.
    pub fn register(&mut self, namespace: u64, world: u32, rank: u32, shard_bytes: u64) -> u32 {
        let completion = self.call_register(&registration(namespace, world, rank, shard_bytes));
        assert_eq!(completion.status, Status::Ok, "{completion:?}");
        completion.results[0] as u32
    }

    /// Registers whatever it is.
    ///
    /// # Panics
    /// When the engine does not answer.
    pub fn call_register(&mut self, registration: &Registration) -> Completion {
        let request = self.register_request(registration);
        self.call(request)
    }

    /// A registration.
    ///
    /// # Panics
    /// When the payload area has no room for it.
    #[must_use]
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

    /// Reserves; the slots to write, for a commit or an abort.
    ///
    /// # Panics
    /// When the engine refuses.
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

    /// Reserves slots until there are none left; which it got.
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

    /// Commits or aborts; what became of each.
    ///
    /// # Panics
    /// When the engine does not answer.
    pub fn finish(&mut self, slots: &[SlotRecord], commit: bool) -> Vec<SlotOutcome> {
        self.payload.write(ARGUMENTS_AT, bytemuck::cast_slice(slots)).expect("room");
        let records = Records { offset: ARGUMENTS_AT, count: slots.len() as u32 };
        let completion = self.call(if commit {
            Request::Commit { slots: records, answer: ANSWER_AT }
        } else {
            Request::Abort { slots: records, answer: ANSWER_AT }
        });
        assert_eq!(completion.status, Status::Ok, "{completion:?}");
        let mut words = vec![0u64; slots.len()];
        self.payload.read(ANSWER_AT, &mut words).expect("room");
        words.into_iter().map(|word| SlotOutcome::from_number(word).expect("an outcome")).collect()
    }

    /// Declares slots; what became of each.
    ///
    /// # Panics
    /// When the engine does not answer.
    pub fn declare(&mut self, slots: &[SlotRecord]) -> Vec<SlotOutcome> {
        self.payload.write(ARGUMENTS_AT, bytemuck::cast_slice(slots)).expect("room");
        let records = Records { offset: ARGUMENTS_AT, count: slots.len() as u32 };
        let completion = self.call(Request::DeclareSlots { slots: records, answer: ANSWER_AT });
        assert_eq!(completion.status, Status::Ok, "{completion:?}");
        let mut words = vec![0u64; slots.len()];
        self.payload.read(ANSWER_AT, &mut words).expect("room");
        words.into_iter().map(|word| SlotOutcome::from_number(word).expect("an outcome")).collect()
    }

    /// Says that a shard is damaged; what became of that.
    ///
    /// # Panics
    /// When the engine does not answer.
    pub fn invalidate(&mut self, record: SlotRecord) -> SlotOutcome {
        let SlotRecord { slot, generation, key, .. } = record;
        let completion = self.call(Request::Invalidate { slot: slot as u32, generation, key });
        assert_eq!(completion.status, Status::Ok, "{completion:?}");
        SlotOutcome::from_number(completion.results[0]).expect("an outcome")
    }

    /// A declaration of a lease on these keys, wherever they are.
    pub fn declare_request(&self, session: u64, admission: u32, namespace: u32, keys: &[Key]) -> Request {
        let record = |(at, key): (usize, &Key)| LeaseRecord {
            key: *key,
            shard: ShardAnswer::new(at as u32, 0, at as u64 % 3),
        };
        let records: Vec<LeaseRecord> = keys.iter().enumerate().map(record).collect();
        let _ = self.payload.write(ARGUMENTS_AT, bytemuck::cast_slice(&records));
        let chunks = Records { offset: ARGUMENTS_AT, count: keys.len() as u32 };
        Request::DeclareLease { session, admission, namespace, chunks }
    }

    /// A lookup of these keys in a namespace of `world` ranks.
    pub fn lookup_request(
        &self,
        session: u64,
        admission: u32,
        namespace: u32,
        world: u32,
        keys: &[Key],
    ) -> Request {
        let _ = self.payload.write(ARGUMENTS_AT, bytemuck::cast_slice(keys));
        let count = keys.len() as u32;
        Request::Lookup {
            session,
            admission,
            namespace,
            keys: Records { offset: ARGUMENTS_AT, count },
            answer: Records { offset: ANSWER_AT, count: count * world },
        }
    }

    /// The shards that the last lookup answered.
    #[must_use]
    pub fn shards(&self, count: usize) -> Vec<ShardAnswer> {
        self.read(ANSWER_AT, count)
    }

    fn read<T: Record>(&self, offset: u32, count: usize) -> Vec<T> {
        let mut records = vec![<T as bytemuck::Zeroable>::zeroed(); count];
        self.payload.read(offset, bytemuck::cast_slice_mut(&mut records)).expect("room");
        records
    }
}

/// A good registration.
#[must_use]
pub fn registration(namespace: u64, world: u32, rank: u32, shard_bytes: u64) -> Registration {
    Registration {
        fingerprint: crate::proto::fingerprint(namespace),
        // What a worker of this shape says, so that both can be ranks of one namespace.
        layout: Kv::new(Shape { blocks: 4, ..Shape::SMALL }).paged().layout_digest(),
        shard_bytes,
        world,
        rank,
        chunk_tokens: 64,
        reserved: 0,
        model: [b'm'; MODEL_NAME_BYTES],
        dtype: [0; DTYPE_BYTES],
    }
}
