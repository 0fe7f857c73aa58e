//! `DeviceLink`: messages over /dev/fuse. Each message and each reply needs one system call.
//!
//! A message is received into a buffer that is large enough for any write. A message that goes to the queue is copied to
//! a smaller one: see `buffers`.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use blkloom_fuse_wire::{Errno, Malformed, Request, Unique, WRITE_DATA_OFFSET, parse_parts, reply};
use blkloom_io::{Buffer, Slice, Source};
use rustix::io;

use super::buffers::Buffers;
use super::link::{Bytes, Ended, Link};
use crate::request::{Memory, OwnedBuffer};

const HEAD: usize = WRITE_DATA_OFFSET;

/// A message as it was read.
pub(super) struct Message {
    /// The message without a write's data, and without names, which are not needed.
    head: [u8; HEAD],
    /// Length of the message in bytes.
    length: usize,
    /// The bytes after the head: a write's data, aligned. None: the queue has not returned the buffer.
    data: Option<OwnedBuffer>,
}

/// Head and length of a message.
pub(super) struct Kept([u8; HEAD], usize);

pub(super) struct DeviceLink {
    fd: OwnedFd,
    /// Messages to serve before any is read, one after the other.
    unserved: Vec<u8>,
    buffers: Buffers,
}

impl Message {
    fn data(&self) -> &[u8] {
        self.data.as_ref().map_or(&[], OwnedBuffer::bytes)
    }

    /// The memory after the head.
    fn memory(&mut self) -> &mut [u8] {
        self.data.as_mut().and_then(OwnedBuffer::unshared).map_or(&mut [], Buffer::bytes_mut)
    }

    fn parts(&self) -> (&[u8], &[u8]) {
        let rest = self.data();
        (&self.head[..self.length.min(HEAD)], &rest[..self.length.saturating_sub(HEAD).min(rest.len())])
    }
}

impl DeviceLink {
    pub fn new(fd: OwnedFd, unserved: Vec<u8>, buffers: Buffers) -> DeviceLink {
        DeviceLink { fd, unserved, buffers }
    }

    /// Reads a message. Returns its length.
    fn read(&self, message: &mut Message) -> Result<Option<usize>, Ended> {
        let mut head = [0; HEAD];
        loop {
            let mut parts = [IoSliceMut::new(&mut head), IoSliceMut::new(message.memory())];
            let result = match io::readv(&self.fd, &mut parts) {
                Ok(length) if length > 0 => Ok(Some(length)),
                // NOENT: the request was aborted before it was read.
                Err(io::Errno::INTR | io::Errno::NOENT) => continue,
                Err(io::Errno::AGAIN) => Ok(None),
                Ok(_) | Err(io::Errno::NODEV) => Err("unmounted".to_owned()),
                Err(io::Errno::CONNABORTED) => Err("the kernel aborted the connection".to_owned()),
                Err(error) => Err(format!("read: {error}")),
            };
            message.head = head;
            return result;
        }
    }

    fn next_unserved(&mut self, message: &mut Message) -> Option<usize> {
        let length = u32::from_ne_bytes(*self.unserved.first_chunk()?) as usize;
        let bytes = self.unserved.get(..length)?;
        let (head, rest) = bytes.split_at(length.min(HEAD));
        message.head.get_mut(..head.len())?.copy_from_slice(head);
        message.memory().get_mut(..rest.len())?.copy_from_slice(rest);
        self.unserved.drain(..length.max(1));
        Some(length)
    }

    fn write(&self, parts: &[IoSlice<'_>]) -> Result<(), Ended> {
        match io::retry_on_intr(|| io::writev(&self.fd, parts)) {
            // NOENT: the request was aborted. NODEV: the file is unmounted, which `receive` reports, too.
            Ok(_) | Err(io::Errno::NOENT | io::Errno::NODEV) => Ok(()),
            Err(error) => Err(format!("write: {error}")),
        }
    }
}

impl Link for DeviceLink {
    type Message = Message;
    type Kept = Kept;

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn receives(&self) -> bool {
        self.buffers.is_ready()
    }

    fn receive(&mut self) -> Result<Option<Message>, Ended> {
        let Some(data) = self.buffers.take() else { return Ok(None) };
        let mut message = Message { head: [0; HEAD], length: 0, data: Some(data) };
        let received = match self.unserved.is_empty() {
            true => self.read(&mut message),
            false => match self.next_unserved(&mut message) {
                Some(length) => Ok(Some(length)),
                None => Err("what an engine before has left is no FUSE message".into()),
            },
        };
        match received {
            Ok(Some(length)) => {
                message.length = length;
                Ok(Some(message))
            }
            other => {
                self.forget(message);
                other.map(|_| None)
            }
        }
    }

    fn is_ready(&self) -> bool {
        !self.unserved.is_empty()
    }

    fn why_broken(&mut self) -> Ended {
        // No buffer may be free, and nothing is served from here on.
        let data = Some(OwnedBuffer::new(Buffer::new(self.buffers.largest_size())));
        match self.read(&mut Message { head: [0; HEAD], length: 0, data }) {
            Err(ended) => ended,
            Ok(_) => "unmounted".to_owned(),
        }
    }

    fn parse<'a>(&'a self, message: &'a Message, joined: &'a mut Vec<u8>) -> Result<Request<'a>, Malformed> {
        let (head, rest) = message.parts();
        parse_parts(head, rest, joined)
    }

    fn room(&self, message: &Message) -> usize {
        message.data().len()
    }

    fn destination<'a>(&'a mut self, message: &'a mut Message, length: usize) -> Slice<'a> {
        Slice::from(message.memory()).part(0, length)
    }

    fn source<'a>(&'a self, message: &'a Message, length: usize) -> Source<'a> {
        message.data()[..length].into()
    }

    fn keep(&mut self, message: Message, bytes: Bytes) -> (Memory, Kept) {
        let Message { head, length, data } = message;
        let kept = Kept(head, length);
        let Some(data) = data else { return (Memory::None, kept) };
        let (length, used) = match bytes {
            Bytes::None => {
                self.buffers.put(data);
                return (Memory::None, kept);
            }
            Bytes::Read { length, done } => (length, done),
            Bytes::Write { length } => (length, length),
        };
        (Memory::Owned(self.buffers.exchange(data, length, used)), kept)
    }

    fn regain(&mut self, Kept(head, length): Kept, memory: Memory) -> Message {
        let data = match memory {
            Memory::Owned(buffer) => Some(buffer),
            _ => None,
        };
        Message { head, length, data }
    }

    fn reply(&mut self, message: Message, reply: &[u8]) -> Result<(), Ended> {
        let sent = self.write(&[IoSlice::new(reply)]);
        self.forget(message);
        sent
    }

    fn reply_data(&mut self, message: Message, unique: Unique, length: usize) -> Result<(), Ended> {
        let sent = match (reply::data(unique, length), message.data().get(..length)) {
            (Some(head), Some(data)) => self.write(&[IoSlice::new(&head), IoSlice::new(data)]),
            _ => self.write(&[IoSlice::new(&reply::error(unique, Errno::IO))]),
        };
        self.forget(message);
        sent
    }

    fn forget(&mut self, message: Message) {
        if let Some(buffer) = message.data {
            self.buffers.put(buffer);
        }
    }

    fn send(&mut self) -> Result<(), Ended> {
        Ok(())
    }

    fn unanswered(&self, Kept(head, length): &Kept, memory: &Memory) -> Vec<u8> {
        // The rest of a write's data, which the end of the file may have shortened.
        let data: &[u8] = match memory {
            Memory::Owned(buffer) => buffer.bytes(),
            _ => &[],
        };
        let mut bytes = [&head[..], data].concat();
        bytes.resize(*length, 0);
        bytes
    }

    fn unserved(&mut self, first: Option<Message>) -> Vec<u8> {
        let mut bytes = first.map_or_else(Vec::new, |message| <[&[u8]; 2]>::from(message.parts()).concat());
        bytes.append(&mut self.unserved);
        bytes
    }

    fn into_descriptor(self) -> OwnedFd {
        self.fd
    }
}
