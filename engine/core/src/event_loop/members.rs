//! The transports of an event loop: start, epoll interest, stall timeouts, completion of requests, and end.
//! Part of `event_loop`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use blkloom_io::Errno;
use rustix::event::epoll;

use super::Loop;
use crate::clock::nanoseconds;
use crate::device::Export;
use crate::notice::Recipient;
use crate::queue::Ended;
use crate::request::{Owner, TransportId};
use crate::transport::{Status, Transport};

/// A message with a new transport for a loop. The loop's count includes it already.
pub struct Serving {
    pub transport: Box<dyn Transport>,
    pub number: u64,
    pub export: Arc<Export>,
    pub recipient: Recipient,
}

pub(super) struct Member {
    pub transport: Box<dyn Transport>,
    /// Unique among all transports of the engine.
    pub number: u64,
    export: Arc<Export>,
    recipient: Recipient,
    /// The registered epoll flags. None: not registered.
    interest: Option<epoll::EventFlags>,
    stalls_at: Option<Instant>,
    /// `Status::taken` at the last check.
    taken: Option<u64>,
    /// Counted in `Loop::leaving`.
    leaving: bool,
}

impl Loop {
    pub(super) fn member(&mut self, TransportId { slot, number }: TransportId) -> Option<&mut Member> {
        self.members.get_mut(slot).filter(|member| member.number == number)
    }

    pub(super) fn serve(&mut self, Serving { transport, number, export, recipient }: Serving) {
        self.reserve(transport.reserves(), &export);
        let (interest, stalls_at, taken, leaving) = (None, None, None, false);
        let member = Member { transport, number, export, recipient, interest, stalls_at, taken, leaving };
        let slot = self.members.insert(member);
        if self.stopping.is_some() {
            self.close(slot);
            return;
        }
        self.active.push(slot);
        self.settle(slot, true);
    }

    /// Allocates memory for so many more requests in flight.
    fn reserve(&mut self, requests: usize, export: &Export) {
        if requests == 0 {
            return;
        }
        for stats in [&export.stats, &export.device.stats] {
            stats.prepare(self.context.shard);
        }
        self.context.queue.reserve(requests);
        let tasks = self.context.queue.reserved_tasks();
        self.mailbox.reserve(tasks);
        self.messages.reserve(tasks);
        self.ended.reserve(tasks);
        self.touched.reserve(self.members.len() + 1);
        self.active.reserve(self.members.len() + 1);
    }

    pub(super) fn close(&mut self, slot: usize) {
        self.members[slot].transport.close("closed by the server");
        self.settle(slot, true);
    }

    /// Returns waiting requests (at a gate, deferred or delayed) to transports that are being detached. A request that
    /// the transport does not accept fails.
    pub(super) fn take_back(&mut self) -> bool {
        let members = &self.members;
        let withdrawn = self.context.queue.withdraw(|TransportId { slot, number }| {
            members.get(slot).is_some_and(|member| member.number == number && member.leaving)
        });
        let any = !withdrawn.is_empty();
        for (id, token, request) in withdrawn {
            self.context.transport = id;
            let device = request.device.clone();
            let refused = match self.members.get_mut(id.slot) {
                Some(member) => member.transport.take_back(token, request, &mut self.context),
                None => Some(request),
            };
            match refused {
                None => {
                    device.stats().withdraw(self.context.shard);
                    self.settle(id.slot, true);
                }
                Some(request) => self.ended.push(Ended { request, error: Some(Errno::SHUTDOWN), found: Vec::new() }),
            }
        }
        any
    }

    /// Completes the requests that the queue has finished. Each transport concerned then sends once.
    pub(super) fn complete_ended(&mut self) -> bool {
        self.context.queue.take_ended(&mut self.ended);
        let any = !self.ended.is_empty();
        let (mut all, mut touched) = (std::mem::take(&mut self.ended), std::mem::take(&mut self.touched));
        for mut ended in all.drain(..) {
            let request = &mut ended.request;
            let bytes = if ended.error.is_none() { request.len } else { 0 };
            let latency = nanoseconds(request.started);
            request.device.stats().end(
                self.context.shard,
                request.op,
                1,
                bytes,
                u64::from(ended.error.is_some()),
                latency,
            );
            match std::mem::replace(&mut request.owner, Owner::None) {
                Owner::Transport { transport: id, token } => {
                    self.context.transport = id;
                    let member = self.members.get_mut(id.slot).filter(|member| member.number == id.number);
                    if let Some(member) = member {
                        member.transport.complete(token, ended, &mut self.context);
                        if !touched.contains(&id) {
                            touched.push(id);
                        }
                    }
                }
                owner => owner.complete(ended.error, ended.found),
            }
        }
        self.ended = all;
        for id in touched.drain(..) {
            let slot = id.slot;
            if let Some(member) = self.members.get_mut(slot) {
                self.context.transport = id;
                member.transport.send(&mut self.context);
                if member.transport.status().ready && !self.active.contains(&slot) {
                    self.active.push(slot);
                }
            }
            self.settle(slot, true);
        }
        self.touched = touched;
        any
    }

    /// Updates epoll interest and stall timeout after a transport's state has changed, and removes a transport that is
    /// over.
    pub(super) fn settle(&mut self, slot: usize, progress: bool) {
        let Some(member) = self.members.get_mut(slot) else {
            return;
        };
        let Status { interest: wanted, stall, taken, leaving, over, .. } = member.transport.status();
        if leaving && !member.leaving {
            member.leaving = true;
            self.leaving += 1;
        }
        // While replies wait, only replies that the client receives count as progress: a client that sends requests and
        // never receives replies would keep memory for ever.
        let progress = progress && (taken.is_none() || taken != member.taken);
        member.taken = taken;
        if let Some(at) = member.stalls_at
            && (progress || stall.is_none() || over)
        {
            self.stalls.remove(&(at, slot));
            member.stalls_at = None;
        }
        if over {
            return self.end(slot);
        }
        if let Some(stall) = stall.filter(|_| member.stalls_at.is_none()) {
            let at = Instant::now() + stall;
            member.stalls_at = Some(at);
            self.stalls.insert((at, slot));
        }
        if wanted == member.interest {
            return;
        }
        let (fd, data) = (member.transport.descriptor(), epoll::EventData::new_u64(slot as u64));
        let changed = match (member.interest, wanted) {
            (None, Some(flags)) => epoll::add(&self.epoll, fd, data, flags),
            (Some(_), Some(flags)) => epoll::modify(&self.epoll, fd, data, flags),
            (_, None) => epoll::delete(&self.epoll, fd),
        };
        member.interest = wanted;
        if let Err(error) = changed {
            member.interest = None;
            member.transport.abort(&format!("epoll: {error}"));
            self.settle(slot, true);
        }
    }

    fn end(&mut self, slot: usize) {
        let Member { transport, export, recipient, interest, leaving, .. } = self.members.remove(slot);
        if interest.is_some() {
            let _watched = epoll::delete(&self.epoll, transport.descriptor());
        }
        self.context.queue.release(transport.reserves());
        self.leaving -= usize::from(leaving);
        self.active.retain(|&other| other != slot);
        self.count.fetch_sub(1, Ordering::Relaxed);
        export.end(transport.kind());
        recipient.tell(transport.end());
    }

    /// Runs expired timers: aborts transports whose client stalled in a request or a reply, and fails unanswered
    /// faults.
    pub(super) fn expire(&mut self) {
        if self.stalls.is_empty() && self.context.queue.next_timer().is_none() {
            return; // a transport with unsent replies is among the stalls
        }
        let now = Instant::now();
        if self.stopping.is_some_and(|until| until <= now) {
            let late = self.members.iter().filter(|(_, member)| member.transport.status().taken.is_some());
            let late: Vec<usize> = late.map(|(slot, _)| slot).collect();
            for slot in late {
                let reason = "the client did not take its replies before the server ended";
                self.members[slot].transport.abort(reason);
                self.settle(slot, true);
            }
        }
        self.context.queue.run_timers(now);
        while let Some(&(at, slot)) = self.stalls.first()
            && at <= now
        {
            self.stalls.remove(&(at, slot));
            if let Some(member) = self.members.get_mut(slot) {
                member.stalls_at = None;
                member.transport.abort("the client stalled in the middle of a request or of its replies");
            }
            self.settle(slot, true);
        }
    }
}
