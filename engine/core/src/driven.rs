//! `Driven`: a descriptor of a backend that an event loop watches, for example a connection to an NBD server.
//!
//! A transport brings requests to the engine; a driven descriptor takes operations away from it. The loop calls `poll`
//! when the descriptor has one of the events of `interest`, after a `DrivenHandle::kick`, and again and again while the
//! loop has other work. Only the loop's thread uses it. It never waits on that thread.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use blkloom_io::Buffer;
use rustix::event::epoll::EventFlags;

use crate::event_loop::Message;
use crate::mailbox::Mailbox;

pub(crate) trait Driven: Send {
    /// The descriptor to watch. It does not change.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// The epoll events to wait for.
    fn interest(&self) -> EventFlags;

    /// Receives and sends. Returns whether there was any work. input: memory to receive into, valid during the call
    /// only.
    fn poll(&mut self, input: &mut Buffer) -> bool;

    /// When `expire` must be called.
    fn deadline(&self) -> Option<Instant>;

    fn expire(&mut self, now: Instant);

    /// It has ended and can be removed.
    fn is_over(&self) -> bool;
}

/// A handle to a `Driven` that a loop has.
#[derive(Clone)]
pub(crate) struct DrivenHandle {
    pub mailbox: Arc<Mailbox<Message>>,
    pub number: u64,
}

impl DrivenHandle {
    /// Makes the loop call `poll`.
    pub fn kick(&self) {
        self.mailbox.send(Message::Kick(self.number));
    }

    /// The loop's queue, as `OperationId::queue` names it.
    pub fn queue(&self) -> usize {
        Arc::as_ptr(&self.mailbox).cast::<()>() as usize
    }
}
