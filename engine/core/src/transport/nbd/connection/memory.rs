//! Memory accounting of one connection: reservations of its requests, and unreserved memory. Part of `connection`,
//! whose invariants hold here.

use blkloom_io::Buffer;
use blkloom_wire::{Command, Header, Style, flags};

use super::{Connection, LITTLE, Leaving, State};
use crate::budget::Need;

/// Largest read whose reply uses the arena.
pub(super) const THROUGH_ARENA: u64 = 256 << 10;
/// Memory of a request without its data.
pub(super) const REQUEST: usize = 1024;
/// Most memory of a block status request and its reply; for a short range, one byte per `STATUS_BYTES` bytes of the
/// range suffices.
const STATUS: u64 = 5 << 18;
const STATUS_BYTES: u64 = 4;

impl Connection {
    /// The most memory that a request may need until its client has taken the reply.
    pub(super) fn need(&self, header: &Header, command: Command) -> Need {
        let length = header.length as usize;
        let bytes = match command {
            Command::Read | Command::Write => {
                let holes = command == Command::Read && header.length > THROUGH_ARENA && self.may_send_holes(header);
                let copies = self.export.device.copies() || holes;
                Buffer::capacity(length) + if copies { length } else { 0 }
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

    /// Counts the unreserved memory of the connection.
    pub(super) fn count_kept(&mut self) {
        let stash = self.stash.capacity();
        let returned = match &self.state {
            State::Detaching(Leaving { returned, .. }) => returned.iter().map(|(_, bytes)| bytes.len()).sum(),
            _ => 0,
        };
        self.kept.set(
            if stash > LITTLE { stash } else { 0 } + self.output.unreserved() + self.stream.footprint() + returned,
        );
    }
}
