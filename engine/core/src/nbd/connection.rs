//! One NBD connection in its transmission phase.
//!
//! `pump` takes everything that has arrived in one receive, serves what it can at once and sends all
//! replies in one send; requests that take time go to the loop's queue and come back through
//! `finish`. An idle connection owns no buffers. Only its loop's thread touches a connection. What a request needs
//! memory for is reserved first (see `budget`); one that must wait for that stays in the stash, and nothing is received.
//!
//! A connection that must end is `Ending` (nothing more is read, what is in flight is answered) or
//! `Gone` (nobody listens any more; what is in flight still has to finish before it is forgotten). One
//! that another engine goes on with is `Detaching` (see `detach`).

mod answer;
mod detach;
mod memory;
mod transfer;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blkloom_io::{Buffer, BufferPool};
use blkloom_wire::{Command, ErrorCode, Framing, Header, Refusal, Rules, Sink, Style, flags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::output::{Arena, Output};
use crate::budget::{Account, Budget, Kept, Reservation, Waiting};
use crate::call::nanoseconds;
use crate::device::{Export, LONGEST_TIMEOUT};
use crate::engine::NbdSession;
use crate::inbox::Inbox;
use crate::notice::{Notices, Outcome};
use crate::now::{self, Now};
use crate::queue::Queue;
use crate::request::{Context, Flags, Memory, Owner, Request};
use crate::stats::{Op, Shard};

/// What the handshake settled.
pub struct Session {
    pub style: Style,
    /// The metadata contexts that were selected; a block status answers for all of them.
    pub contexts: Box<[Selected]>,
    pub unfinished: Unfinished,
    pub max_payload: u32,
    /// A client that stops in the middle of a request, or of taking replies, is dropped after this.
    pub stall: Duration,
}

/// What the handshake, or the engine that had the connection before, has left to be done.
#[derive(Default)]
pub struct Unfinished {
    /// Bytes received and not served.
    pub initial: Vec<u8>,
    /// Bytes of replies that the client has not taken yet.
    pub unsent: Vec<u8>,
    /// What was being skipped; it comes behind `initial`.
    pub skipping: Option<Skipping>,
}

impl From<Vec<u8>> for Unfinished {
    fn from(initial: Vec<u8>) -> Unfinished {
        Unfinished { initial, ..Unfinished::default() }
    }
}

/// The payload of a refused request: so many bytes are skipped, then the reply is sent.
pub struct Skipping {
    pub left: u64,
    pub reply: Vec<u8>,
}

/// A metadata context, with the number the client knows it by.
pub struct Selected {
    pub id: u32,
    pub context: Context,
}

/// What a loop lends its connections.
pub struct Workbench {
    pub queue: Queue,
    pub buffers: BufferPool,
    pub arena: Arena,
    pub inbox: Arc<Inbox>,
    pub zeros: Vec<(u64, u64)>,
    pub shard: Shard,
    /// Nothing moved in the turn before.
    pub was_idle: bool,
}

/// What a finished request must know to be answered.
pub struct Ticket {
    pub slot: usize,
    pub id: u64,
    /// How many of the connection's requests came to the queue before it.
    order: u64,
    header: Header,
    command: Command,
    /// A block status: what the contexts say, in order, as far as they were asked.
    told: Vec<Vec<(u64, u32)>>,
    reservation: Reservation,
}

enum Input {
    Header,
    Payload {
        /// Of what is left of the write, where parts of it are written already.
        header: Header,
        /// For all of that, or for a part at a time.
        buffer: Buffer,
        have: usize,
        reservation: Reservation,
    },
    Skip(Skipping),
}

enum Received {
    Nothing,
    End,
    /// Only (part of) the payload under way.
    Payload,
    /// So many bytes, in the input buffer behind those that were stashed.
    Bytes {
        count: usize,
        behind: usize,
    },
}

enum State {
    Open,
    /// returned: requests taken back so far, their order and their bytes. drain: not before the client has taken its
    /// replies.
    Detaching {
        returned: Vec<(u64, Vec<u8>)>,
        drain: bool,
    },
    Ending(String),
    Gone(String),
}

/// Requests ended at once in this turn, to be counted together: (count, bytes, errors) by operation. Bytes without a
/// count are of a write that goes on in parts.
type Tally = [(u64, u64, u64); Op::ALL.len()];

pub struct Connection {
    pub id: u64,
    fd: OwnedFd,
    export: Arc<Export>,
    rules: Rules,
    contexts: Box<[Selected]>,
    notices: Arc<Notices>,
    token: u64,
    pub stall: Duration,
    input: Input,
    /// Received but not taken yet: part of a header, or more while the connection is full.
    stash: Vec<u8>,
    /// What the engine that had it before was skipping: comes behind what is stashed.
    skips_next: Option<Skipping>,
    output: Output,
    account: Arc<Account>,
    kept: Kept,
    /// For memory; the next request is in the stash.
    waiting: Option<Waiting>,
    /// For the next request, which waited for it.
    reserved: Option<Reservation>,
    in_flight: usize,
    in_flight_bytes: u64,
    /// Requests given to the queue, ever.
    queued: u64,
    state: State,
    /// Another engine is to go on with it, whatever became of that.
    leaving: bool,
    /// The client's request to disconnect, once it came.
    parting: Option<Header>,
    tally: Tally,
}

const MOST_IN_FLIGHT: usize = 1024;
const MOST_BYTES_IN_FLIGHT: u64 = 64 << 20;
/// More would leave the processor's cache before it is sent.
const MOST_OUTPUT: usize = 256 << 10;
/// Bytes of replies that leave together at the beginning of a turn that was waited for; then twice as many, and so on.
const FIRST_REPLIES: usize = 16 << 10;
/// Received at once while memory is tight, and kept without being counted.
const LITTLE: usize = 4096;
/// Reads up to this size are answered through the arena.
const THROUGH_ARENA: u64 = 256 << 10;
/// Room a head, an error or a block status that fits a page takes at most.
const HEAD: usize = 4096 + 64;

impl Connection {
    pub fn new(id: u64, session: NbdSession, budget: Arc<Budget>) -> Connection {
        let NbdSession { export, fd, session, notices, token } = session;
        export.connections.fetch_add(1, Ordering::Relaxed);
        let rules = Rules {
            style: session.style,
            size: export.device.size(),
            read_only: export.read_only,
            block_status: !session.contexts.is_empty(),
            max_payload: u64::from(session.max_payload),
        };
        let Unfinished { initial, unsent, skipping } = session.unfinished;
        let mut output = Output::default();
        if !unsent.is_empty() {
            output.push(unsent, None, None);
        }
        let (input, skips_next) = match skipping {
            Some(skipping) if initial.is_empty() => (Input::Skip(skipping), None),
            skipping => (Input::Header, skipping),
        };
        let account = Account::new(budget, export.device.clone(), id, is_own_process(&fd));
        Connection {
            id,
            fd,
            export,
            rules,
            contexts: session.contexts,
            notices,
            token,
            stall: session.stall.min(LONGEST_TIMEOUT),
            input,
            stash: initial,
            skips_next,
            output,
            kept: Kept::new(account.clone()),
            account,
            waiting: None,
            reserved: None,
            in_flight: 0,
            in_flight_bytes: 0,
            queued: 0,
            state: State::Open,
            leaving: false,
            parting: None,
            tally: Tally::default(),
        }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn wants_input(&self) -> bool {
        self.takes_input() && !self.full()
    }

    /// What arrives belongs to a request it serves or refuses.
    fn takes_input(&self) -> bool {
        matches!(self.state, State::Open)
    }

    pub fn wants_output(&self) -> bool {
        !self.output.is_empty() && !self.is_gone()
    }

    /// Bytes of replies the socket has not taken yet.
    pub fn waiting_output(&self) -> usize {
        self.output.bytes()
    }

    /// While replies wait: how many bytes of such ones the client has taken, ever.
    pub fn taken(&self) -> Option<u64> {
        self.wants_output().then(|| self.output.sent())
    }

    pub fn is_gone(&self) -> bool {
        matches!(self.state, State::Gone(_))
    }

    /// Nothing of it is left to do.
    pub fn is_over(&self) -> bool {
        self.in_flight == 0
            && match self.state {
                State::Open => false,
                State::Detaching { drain, .. } => !drain || self.output.is_empty(),
                State::Ending(_) => self.output.is_empty(),
                State::Gone(_) => true,
            }
    }

    /// It waits for the client to go on with something begun.
    pub fn is_waiting(&self) -> bool {
        let mid_request = !matches!(self.input, Input::Header) || !self.stash.is_empty() && !self.full();
        self.wants_output() || mid_request && self.takes_input()
    }

    /// It has received whole headers that it may serve now, though nothing new need arrive for it.
    pub fn can_go_on(&self) -> bool {
        self.takes_input() && !self.full() && self.stash.len() >= self.rules.style.header_size()
    }

    fn full(&self) -> bool {
        self.waiting.is_some()
            || self.in_flight >= MOST_IN_FLIGHT
            || self.in_flight_bytes >= MOST_BYTES_IN_FLIGHT
            || self.output.bytes() >= MOST_OUTPUT
            || !self.output.is_empty() && self.account.is_tight()
    }

    pub fn end(&mut self, reason: &str) {
        if matches!(self.state, State::Open) {
            self.state = State::Ending(reason.to_owned());
            self.forget_input();
        }
    }

    pub fn gone(&mut self, reason: &str) {
        if !self.is_gone() {
            let reason = match &self.state {
                State::Ending(first) => first.clone(),
                _ => reason.to_owned(),
            };
            self.state = State::Gone(reason);
            self.output.clear();
            self.forget_input();
            // A peer that still writes is told at once, whoever else holds the socket.
            let _unconnected = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
        }
    }

    fn forget_input(&mut self) {
        self.stash = Vec::new();
        self.input = Input::Header;
        self.waiting = None;
        self.reserved = None;
    }

    /// Says that it is over.
    pub fn announce(self) {
        self.export.connections.fetch_sub(1, Ordering::Relaxed);
        let (notices, token) = (self.notices.clone(), self.token);
        notices.push(token, self.outcome());
    }

    fn outcome(mut self) -> Outcome {
        match std::mem::replace(&mut self.state, State::Open) {
            State::Open => Outcome::Closed { reason: "closed".to_owned() },
            State::Detaching { returned, .. } => self.detached(returned),
            State::Ending(reason) | State::Gone(reason) => Outcome::Closed { reason },
        }
    }

    /// Takes what has arrived and serves it. Returns whether anything was received or served.
    pub fn pump(&mut self, slot: usize, bench: &mut Workbench, input: &mut Buffer) -> bool {
        if !self.wants_input() {
            return false;
        }
        let started = Instant::now();
        let stashed = self.stash.len();
        match self.receive(input) {
            Ok(Received::Bytes { count, behind }) => {
                self.consume(slot, &input.bytes()[..behind + count], bench, started)
            }
            Ok(Received::Payload) => self.finish_payload(slot, bench, started),
            // What was stashed, while the connection was full or by the engine that had it before, may go
            // on now; an end or an error shows again at the next receive.
            Ok(Received::Nothing | Received::End) | Err(_) if stashed >= self.rules.style.header_size() => {
                let stash = std::mem::take(&mut self.stash);
                self.consume(slot, &stash, bench, started);
            }
            Ok(Received::Nothing) => return false,
            Ok(Received::End) | Err(Errno::CONNRESET) => {
                let middle = !matches!(self.input, Input::Header) || stashed > 0;
                self.gone(if middle { "the client vanished in the middle of a request" } else { "the client hung up" });
            }
            Err(error) => self.gone(&format!("receive: {error}")),
        }
        self.flush(bench);
        self.count(bench, started);
        true
    }

    /// Receives once. A payload under way is filled first.
    fn receive(&mut self, into: &mut Buffer) -> Result<Received, Errno> {
        let mut filled = false;
        if let Input::Payload { header, buffer, have, .. } = &mut self.input {
            let want = buffer.len() - *have;
            match receive(&self.fd, &mut buffer.bytes_mut()[*have..]) {
                Ok(0) => return Ok(Received::End),
                Ok(count) => {
                    *have += count;
                    filled = true;
                    if count < want || (buffer.len() as u64) < header.length {
                        return Ok(Received::Payload);
                    }
                }
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(error) => return Err(error),
            }
        }
        let behind = self.stash.len();
        if behind >= into.len() || self.skips_next.is_some() {
            return Ok(Received::Nothing); // what there is must be served first
        }
        let room = if self.account.is_tight() { LITTLE } else { into.len() };
        let end = into.len().min(behind + room);
        match receive(&self.fd, &mut into.bytes_mut()[behind..end]) {
            // An end or an error shows again at the next receive, after this payload was served.
            Ok(0) | Err(_) if filled => Ok(Received::Payload),
            Ok(0) => Ok(Received::End),
            Ok(count) => {
                into.bytes_mut()[..behind].copy_from_slice(&self.stash);
                self.stash.clear();
                self.stash.shrink_to(LITTLE);
                Ok(Received::Bytes { count, behind })
            }
            Err(Errno::AGAIN) => Ok(Received::Nothing),
            Err(error) => Err(error),
        }
    }

    fn consume(&mut self, slot: usize, bytes: &[u8], bench: &mut Workbench, started: Instant) {
        let mut at = 0;
        // A client that the loop has waited for waits, too: it can take the first data, and send its next requests,
        // while the others are served. Where the loop has other work one send for all costs less.
        let mut enough = if bench.was_idle { FIRST_REPLIES } else { usize::MAX };
        self.finish_payload(slot, bench, started);
        while at < bytes.len() && self.takes_input() {
            if let Input::Skip(skipping) = &mut self.input {
                let skipped = skipping.left.min((bytes.len() - at) as u64);
                skipping.left -= skipped;
                at += skipped as usize;
                if skipping.left == 0 {
                    let reply = std::mem::take(&mut skipping.reply);
                    self.input = Input::Header;
                    self.put(reply, bench);
                }
                continue;
            }
            if self.full() {
                break;
            }
            match self.rules.style.header(&bytes[at..]) {
                Ok(Some(header)) => {
                    let behind = at + self.rules.style.header_size();
                    match self.request(slot, header, &bytes[behind..], bench, started) {
                        Some(taken) => at = behind + taken,
                        None => break,
                    }
                    if bench.arena.used() >= enough {
                        self.flush(bench);
                        enough *= 2;
                    }
                }
                Ok(None) => break,
                Err(malformed) => {
                    self.gone(&format!("garbage: request magic {:#010x}", malformed.magic));
                    return;
                }
            }
        }
        if self.takes_input() {
            self.stash.extend_from_slice(&bytes[at..]);
            if self.stash.is_empty()
                && let Some(skipping) = self.skips_next.take()
            {
                self.input = Input::Skip(skipping);
            }
        }
        self.reserved = None; // whatever was to use it does not need it any more
    }

    /// Serves a write whose payload has come whole, or what has come of one that is written in parts.
    fn finish_payload(&mut self, slot: usize, bench: &mut Workbench, started: Instant) {
        match std::mem::replace(&mut self.input, Input::Header) {
            Input::Payload { header, buffer, have, reservation } if (buffer.len() as u64) < header.length => {
                self.input = self.next_part(header, buffer, have, reservation, bench);
            }
            Input::Payload { header, buffer, have, reservation } if have == buffer.len() => {
                // SAFETY: the buffer lives to the end of this block; the write happens in `write_now`.
                let memory = unsafe { buffer.slice() };
                match self.write_now(&header, memory, bench) {
                    Some(done) => {
                        let memory = Memory::Owned(Arc::new(buffer));
                        self.later(slot, &header, (memory, reservation), done, bench, started);
                    }
                    None => bench.buffers.put(buffer),
                }
            }
            unfinished => self.input = unfinished,
        }
    }

    /// One request; returns how many of the bytes behind its header it took. None: it waits for memory.
    fn request(
        &mut self,
        slot: usize,
        header: Header,
        rest: &[u8],
        bench: &mut Workbench,
        started: Instant,
    ) -> Option<usize> {
        self.rules.size = self.export.device.size();
        let request = header.request(&self.rules);
        let framing = self.framing(&header);
        if bench.arena.room() < HEAD {
            self.flush(bench);
        }
        if let Some(mut refusal) = request.refusal {
            if self.export.device.closed() {
                refusal = Refusal { code: ErrorCode::Shutdown, why: "the device is closed" };
            }
            if self.rules.style == Style::Extended && request.payload > self.rules.max_payload {
                self.gone("a payload longer than the maximum");
                return Some(0);
            }
            if request.payload == 0 {
                self.refuse(&framing, refusal, bench);
            } else {
                let mut reply = Vec::new();
                blkloom_wire::error(&framing, &mut reply, refusal.code, refusal.why);
                self.input = Input::Skip(Skipping { left: request.payload, reply });
            }
            return Some(0);
        }
        match request.command {
            Some(Command::Disconnect) => {
                self.end("the client disconnected");
                self.parting = Some(header);
            }
            Some(Command::Write) => return self.write(slot, &header, rest, bench, started),
            Some(Command::Read) => self.read(slot, &header, bench, started)?,
            Some(command) => self.command(slot, &header, command, bench, started)?,
            None => {}
        }
        Some(0)
    }

    fn framing(&self, header: &Header) -> Framing {
        Framing { style: self.rules.style, cookie: header.cookie, offset: header.offset }
    }

    /// A reply of whatever length.
    fn put(&mut self, reply: Vec<u8>, bench: &mut Workbench) {
        if bench.arena.room() < reply.len() {
            self.flush(bench);
        }
        match bench.arena.room() < reply.len() {
            true => self.output.push(reply, None, None),
            false => bench.arena.put(&reply),
        }
    }

    fn refuse(&mut self, framing: &Framing, refusal: Refusal, bench: &mut Workbench) {
        if bench.arena.room() < HEAD {
            self.flush(bench);
        }
        blkloom_wire::error(framing, &mut bench.arena, refusal.code, refusal.why);
    }

    fn command(
        &mut self,
        slot: usize,
        header: &Header,
        command: Command,
        bench: &mut Workbench,
        started: Instant,
    ) -> Option<()> {
        let op = operation(command);
        let device = &self.export.device;
        let wanted = wanted(header.flags);
        let attempt = match op {
            _ if header.length == 0 && op != Op::Flush => Now::Done,
            Op::Flush => now::flush(device, bench.shard),
            Op::Discard | Op::WriteZeroes => now::clear(device, bench.shard, op, header.offset, header.length, wanted),
            _ => Now::Later(0),
        };
        if let Some(done) = self.answer_now(header, op, attempt, bench) {
            let reservation = self.reserve(slot, self.need(header, command), bench)?;
            self.later(slot, header, (Memory::None, reservation), done, bench, started);
        }
        Some(())
    }

    /// Gives the rest of a request to the queue.
    fn later(
        &mut self,
        slot: usize,
        header: &Header,
        (memory, reservation): (Memory, Reservation),
        done: u64,
        bench: &mut Workbench,
        started: Instant,
    ) {
        let Some(command) = header.request(&self.rules).command else {
            return;
        };
        let (op, length) = (operation(command), header.length);
        let ticket =
            Ticket { slot, id: self.id, order: self.queued, header: *header, command, told: Vec::new(), reservation };
        self.queued += 1;
        self.in_flight += 1;
        self.in_flight_bytes += if matches!(memory, Memory::None) { 0 } else { length };
        self.export.stats.start(bench.shard, 1);
        self.export.device.stats.start(bench.shard, 1);
        bench.queue.submit(Request {
            device: self.export.device.clone(),
            op,
            offset: header.offset,
            len: length,
            flags: wanted(header.flags),
            memory,
            context: self.next_context(&ticket),
            owner: Owner::Connection(ticket),
            started,
            done,
        });
    }

    /// Sends the arena and what waits.
    pub fn flush(&mut self, bench: &mut Workbench) {
        if self.is_gone() {
            bench.arena.rewind(0);
        } else if let Err(error) = self.output.send_arena(&self.fd, &mut bench.arena, &mut bench.buffers) {
            bench.arena.rewind(0);
            self.gone(&format!("send: {error}"));
        }
    }

    /// Sends what waits.
    pub fn send(&mut self, bench: &mut Workbench) {
        if !self.is_gone()
            && let Err(error) = self.output.send(&self.fd, &mut bench.buffers)
        {
            self.gone(&format!("send: {error}"));
        }
    }

    fn tally(&mut self, op: Op, bytes: u64, failed: bool) {
        let tally = &mut self.tally[op as usize];
        *tally = (tally.0 + 1, tally.1 + bytes, tally.2 + u64::from(failed));
    }

    fn count(&mut self, bench: &Workbench, started: Instant) {
        let latency = nanoseconds(started);
        for (op, tally) in Op::ALL.into_iter().zip(&mut self.tally) {
            let (count, bytes, errors) = std::mem::take(tally);
            if count > 0 || bytes > 0 {
                for stats in [&self.export.stats, &self.export.device.stats] {
                    stats.start(bench.shard, count);
                    stats.end(bench.shard, op, count, bytes, errors, latency);
                }
            }
        }
    }
}

fn receive(fd: &OwnedFd, into: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match recv(fd, &mut *into, RecvFlags::DONTWAIT) {
            Ok((count, _)) => return Ok(count),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The client is a thread of this very process.
fn is_own_process(fd: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_peercred(fd).is_ok_and(|peer| peer.pid == rustix::process::getpid())
}

fn operation(command: Command) -> Op {
    match command {
        Command::Read => Op::Read,
        Command::Write => Op::Write,
        Command::Flush | Command::Disconnect => Op::Flush,
        Command::Trim => Op::Discard,
        Command::Cache => Op::Cache,
        Command::WriteZeroes => Op::WriteZeroes,
        Command::BlockStatus => Op::Extents,
    }
}

fn wanted(bits: u16) -> Flags {
    Flags {
        fua: bits & flags::FUA != 0,
        unmap: bits & flags::NO_HOLE == 0,
        fast: bits & flags::FAST_ZERO != 0,
        one: bits & flags::REQ_ONE != 0,
        through_gate: false,
    }
}
