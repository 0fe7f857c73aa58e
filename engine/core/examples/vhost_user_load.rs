//! Load generator for vhost-user-blk servers. Its driver is the crate `virtio-driver`, which libblkio uses, too.
//!
//! One thread, any number of queues. Prints one line of JSON. Arguments: [--poll] SOCKET PATTERN BLOCK DEPTH QUEUES SIZE
//! SECONDS
//!
//! Without --poll it sleeps until the server raises an event of a queue, as a virtual machine does; with it, it looks at
//! the used rings all the time, and asks for no events. The other arguments are those of `nbd_load`. Buffers are shared
//! with the server and prepared before; nobody looks at their contents.

use std::ffi::c_void;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport,
    VirtioFeatureFlags,
};

mod load;

use load::{Job, Run};

/// A request has three descriptors: header, data and status.
const DESCRIPTORS: usize = 3;

/// In flight: its slot, whether a flush follows it, and when it began.
struct Request {
    slot: usize,
    write: bool,
    since: Instant,
}

struct Queue {
    requests: VirtioBlkQueue<'static, Request>,
    notifier: Box<dyn QueueNotifier>,
    event: Arc<EventFd>,
    /// Of the slots, one after the other.
    buffers: *mut u8,
    free: Vec<usize>,
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let polling = arguments.first().is_some_and(|word| word == "--poll");
    arguments.drain(..usize::from(polling));
    let [socket, rest @ ..] = &arguments[..] else { return Err(ErrorKind::InvalidInput.into()) };
    let (job, number) = Job::parse(rest)?;
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    // FLUSH (9) and MQ (12); see the virtio specification, 5.2.3.
    let features = features.bits() | 1 << 9 | 1 << 12;
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(socket, features)?);
    let buffers = shared(transport.as_mut(), number * job.depth * job.block, &job)?;
    let size = (job.depth * DESCRIPTORS).next_power_of_two();
    let size = u16::try_from(size).map_err(|_| Error::new(ErrorKind::InvalidInput, "the depth is too large"))?;
    let mut queues: Vec<Queue> = VirtioBlkQueue::setup_queues(transport.as_mut(), number, size)?
        .into_iter()
        .enumerate()
        .map(|(index, requests)| Queue {
            requests,
            notifier: transport.get_submission_notifier(index),
            event: transport.get_completion_fd(index),
            buffers: buffers.wrapping_add(index * job.depth * job.block),
            free: (0..job.depth).collect(),
        })
        .collect();
    let mut run = Run::start(job)?;
    run_all(&mut run, &mut queues, polling)?;
    if job.end_flush {
        queues[0].requests.flush(Request { slot: 0, write: false, since: Instant::now() })?;
        queues[0].notifier.notify()?;
        run.errors += loop {
            if let Some(done) = queues[0].requests.completions().next() {
                break u64::from(done.ret != 0);
            }
        };
    }
    run.report()
}

/// Memory that the server may access, with data to write; it stays until this process ends.
fn shared(transport: &mut VirtioBlkTransport, length: usize, job: &Job) -> Result<*mut u8> {
    let memory = memfd_create("buffers", MemfdFlags::CLOEXEC)?;
    ftruncate(&memory, length as u64)?;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let address = unsafe {
        mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &memory, 0)?
    };
    for (at, byte) in job.payload().cycle().take(length).enumerate() {
        // SAFETY: within the mapping, which nobody else uses yet.
        unsafe { address.cast::<u8>().add(at).write(byte) };
    }
    transport.map_mem_region(address as usize, length, memory.as_raw_fd(), 0)?;
    Ok(address.cast())
}

/// Runs the job to its end over all queues.
fn run_all(run: &mut Run, queues: &mut [Queue], polling: bool) -> Result<()> {
    for queue in queues.iter_mut() {
        queue.requests.set_used_notif_enabled(!polling);
        queue.refill(run)?;
    }
    while queues.iter().any(|queue| queue.free.len() < run.job.depth) {
        if !polling {
            wait(queues)?;
        }
        for queue in queues.iter_mut() {
            if queue.take(run)? {
                queue.refill(run)?;
            }
        }
        std::hint::spin_loop();
    }
    Ok(())
}

/// Until the server has raised an event.
fn wait(queues: &[Queue]) -> Result<()> {
    let mut events: Vec<PollFd> =
        queues.iter().map(|queue| PollFd::from_borrowed_fd(queue.event.as_fd(), PollFlags::IN)).collect();
    match poll(&mut events, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    for (queue, event) in queues.iter().zip(&events) {
        if event.revents().contains(PollFlags::IN) {
            queue.event.read()?;
        }
    }
    Ok(())
}

impl Queue {
    /// Takes what is done; whether there was anything.
    fn take(&mut self, run: &mut Run) -> Result<bool> {
        let now = Instant::now();
        let mut flushes = Vec::new();
        let mut any = false;
        for done in self.requests.completions() {
            any = true;
            run.errors += u64::from(done.ret != 0);
            if done.context.write && run.job.flush {
                flushes.push(Request { write: false, ..done.context });
            } else {
                run.latencies.push(now - done.context.since);
                self.free.push(done.context.slot);
            }
        }
        for request in flushes {
            self.requests.flush(request)?;
        }
        Ok(any)
    }

    fn refill(&mut self, run: &mut Run) -> Result<()> {
        let now = Instant::now();
        while let Some(&slot) = self.free.last()
            && let Some(next) = run.next(now)
        {
            self.free.pop();
            let data = virtio_driver::iovec {
                iov_base: self.buffers.wrapping_add(slot * run.job.block).cast::<c_void>(),
                iov_len: run.job.block,
            };
            let request = Request { slot, write: next.write, since: now };
            // SAFETY: the slot's part of the shared buffers, which stay; it has no other request in flight.
            unsafe {
                if next.write {
                    self.requests.writev(next.offset, &data, 1, request)?;
                } else {
                    self.requests.readv(next.offset, &data, 1, request)?;
                }
            }
        }
        if self.requests.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }
}
