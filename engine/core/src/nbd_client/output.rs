//! Send queue of a connection: request headers and payloads, sent together by gathered sends.

use std::collections::VecDeque;
use std::io::IoSlice;

use blkloom_wire::{Header, Style};

use super::line::Line;
use crate::transport::nbd::StreamError;

/// Payloads up to this length are copied behind their header; longer ones are sent from where they are.
pub(super) const COPIED: usize = 16 << 10;
/// Most memory that is kept for the next part.
const SPARE: usize = 1 << 20;
/// Most parts of one gathered send.
const PARTS: usize = 64;

enum Part {
    Bytes(Vec<u8>),
    /// The payload of the request in this slot.
    Payload {
        slot: usize,
        len: usize,
    },
}

impl Part {
    fn len(&self) -> usize {
        match self {
            Part::Bytes(bytes) => bytes.len(),
            Part::Payload { len, .. } => *len,
        }
    }
}

#[derive(Default)]
pub(super) struct Output {
    parts: VecDeque<Part>,
    /// Bytes of the first part that are sent.
    begun: usize,
    /// Total bytes queued and sent.
    queued: u64,
    sent: u64,
    /// Memory for the next part.
    spare: Vec<u8>,
}

impl Output {
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Total bytes that were queued until now.
    pub fn queued(&self) -> u64 {
        self.queued
    }

    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Queues a request. payload: copied.
    pub fn request(&mut self, header: Header, style: Style, payload: &[u8]) {
        if !matches!(self.parts.back(), Some(Part::Bytes(_))) {
            self.parts.push_back(Part::Bytes(std::mem::take(&mut self.spare)));
        }
        if let Some(Part::Bytes(bytes)) = self.parts.back_mut() {
            let before = bytes.len();
            header.put(style, bytes);
            bytes.extend_from_slice(payload);
            self.queued += (bytes.len() - before) as u64;
        }
    }

    /// Queues the payload of the request in a slot, which must stay there until it is sent.
    pub fn payload(&mut self, slot: usize, len: usize) {
        self.parts.push_back(Part::Payload { slot, len });
        self.queued += len as u64;
    }

    /// Sends as much as the socket takes. payload: that of the request in a slot. Returns whether anything was sent.
    pub fn send<'a>(&mut self, line: &mut Line, payload: impl Fn(usize) -> &'a [u8]) -> Result<bool, StreamError> {
        let mut any = false;
        while !self.parts.is_empty() {
            let slices: Vec<IoSlice<'_>> = self
                .parts
                .iter()
                .take(PARTS)
                .enumerate()
                .map(|(at, part)| {
                    let bytes = match part {
                        Part::Bytes(bytes) => &bytes[..],
                        Part::Payload { slot, .. } => payload(*slot),
                    };
                    IoSlice::new(&bytes[if at == 0 { self.begun } else { 0 }..])
                })
                .collect();
            let count = match line.send(&slices) {
                Ok(count) => count,
                Err(StreamError::Again) => return Ok(any),
                Err(error) => return Err(error),
            };
            any = true;
            self.sent += count as u64;
            self.begun += count;
            while self.parts.front().is_some_and(|part| part.len() <= self.begun)
                && let Some(part) = self.parts.pop_front()
            {
                self.begun -= part.len();
                if let Part::Bytes(mut bytes) = part
                    && bytes.capacity() <= SPARE
                {
                    bytes.clear();
                    self.spare = bytes;
                }
            }
        }
        Ok(any)
    }
}
