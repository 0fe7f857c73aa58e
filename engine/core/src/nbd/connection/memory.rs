//! The memory of one connection: what its requests reserve, and what it keeps besides. Part of `connection`, whose
//! invariants hold here.

use blkloom_io::Buffer;
use blkloom_wire::{Command, Header, Style, flags};

use super::{Connection, LITTLE, State, THROUGH_ARENA, Workbench};
use crate::budget::{Need, Reservation};
use crate::device::Copies;

/// What is kept of a request besides its bytes.
pub(super) const REQUEST: usize = 1024;
/// Whole blocks around the bytes of a direct I/O.
const BLOCKS: usize = 2 * 4096;
/// The most that a block status gathers and answers with, and as much of it for each byte of a range as the finest
/// extents need.
const STATUS: u64 = 5 << 18;
const STATUS_BYTES: u64 = 4;

impl Connection {
    /// The most memory that a request may need until its client has taken the reply.
    pub(super) fn need(&self, header: &Header, command: Command) -> Need {
        let length = header.length as usize;
        let bytes = match command {
            Command::Read | Command::Write => {
                let holes = command == Command::Read && header.length > THROUGH_ARENA && self.may_send_holes(header);
                let copies = match self.export.device.copies() {
                    Copies::None if !holes => 0,
                    Copies::None | Copies::Bytes => length,
                    Copies::Blocks => length + BLOCKS,
                };
                Buffer::capacity(length) + copies
            }
            Command::BlockStatus if header.flags & flags::REQ_ONE == 0 => {
                STATUS.min(header.length / STATUS_BYTES) as usize
            }
            _ => 0,
        };
        let length = if matches!(command, Command::Read | Command::Write) { header.length } else { 0 };
        Need::new(length, bytes + REQUEST)
    }

    pub(super) fn may_send_holes(&self, header: &Header) -> bool {
        self.rules.style != Style::Simple && header.flags & flags::DF == 0
    }

    /// None: the request is to be left in the stash; it is taken up once there is memory for it.
    pub(super) fn reserve(&mut self, slot: usize, need: Need, bench: &Workbench) -> Option<Reservation> {
        if let Some(reservation) = self.reserved.take().filter(|reservation| reservation.covers(need)) {
            return Some(reservation);
        }
        let reservation = self.account.reserve(need);
        if reservation.is_none() {
            self.waiting = Some(self.account.wait(need, bench.inbox.clone(), slot));
        }
        reservation
    }

    /// The memory that the next request waited for.
    pub fn reserved(&mut self, reservation: Reservation) {
        if self.waiting.take().is_some() {
            self.reserved = Some(reservation);
        }
    }

    /// Counts what it keeps without having reserved it.
    pub fn count_kept(&mut self) {
        let stash = self.stash.capacity();
        let returned = match &self.state {
            State::Detaching { returned, .. } => returned.iter().map(|(_, bytes)| bytes.len()).sum(),
            _ => 0,
        };
        self.kept.set(if stash > LITTLE { stash } else { 0 } + self.output.unreserved() + returned);
    }
}
