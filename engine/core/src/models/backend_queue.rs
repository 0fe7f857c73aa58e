//! `BackendQueue`: threads that submit and cancel, one that takes, and one that completes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize as Counter, Ordering as CounterOrdering};

use loom::thread;

use super::explore;
use crate::backend::{Backend, Limits, Operation, OperationId};
use crate::backend_queue::BackendQueue;
use crate::fault::{Answered, Payload};
use crate::mailbox::Post;
use crate::operation::Flags;
use crate::stats::Op;
use crate::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use crate::wake::TaskId;

/// Counts the answers of each operation.
#[derive(Default)]
struct Answers([AtomicUsize; 2]);

impl Post<Answered> for Answers {
    fn post(&self, answered: Answered) {
        self.0[answered.task.slot].fetch_add(1, SeqCst);
    }
}

impl Answers {
    fn of(&self, slot: usize) -> usize {
        self.0[slot].load(SeqCst)
    }
}

/// One that takes operations one at a time.
fn queue() -> (Arc<BackendQueue>, Arc<Answers>) {
    let limits = Limits { longest: 4096, most: 1, most_bytes: 1 << 20 };
    (Arc::new(BackendQueue::new(limits).unwrap()), Arc::default())
}

fn id(slot: usize) -> OperationId {
    OperationId { queue: 1, slot, generation: 1 }
}

fn submit(queue: &BackendQueue, answers: &Arc<Answers>, slot: usize) {
    let task = TaskId { slot, generation: 1 };
    let operation =
        Operation::new(id(slot), Op::Write, 0, 512, Flags::default(), Payload::None, (answers.clone(), task));
    queue.submit(operation);
}

#[test]
fn a_taker_that_sleeps_is_woken_by_operations_and_by_room_for_them() {
    explore("backend queue: two operations, a taker that sleeps, room for one", || {
        let (queue, answers) = queue();
        let submitting = {
            let (queue, answers) = (queue.clone(), answers.clone());
            thread::spawn(move || [0, 1].into_iter().for_each(|slot| submit(&queue, &answers, slot)))
        };
        let mut completing = Vec::new();
        while completing.len() < 2 {
            let begun = queue.take().begun;
            if begun.is_empty() {
                // A wake-up that is lost is a deadlock here.
                queue.event.wait();
            }
            for mut operation in begun {
                assert_eq!(operation.id, id(completing.len()), "in order");
                let queue = queue.clone();
                completing.push(thread::spawn(move || queue.complete(&mut operation, Ok(None))));
            }
        }
        submitting.join().unwrap();
        completing.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!([0, 1].map(|slot| answers.of(slot)), [1, 1]);
        assert!(queue.take().begun.is_empty());
    });
}

#[test]
fn an_operation_is_answered_once_whether_it_is_cancelled_before_it_is_taken_or_after() {
    let (before, after) = (Arc::new(Counter::new(0)), Arc::new(Counter::new(0)));
    let met = (before.clone(), after.clone());
    explore("backend queue: an operation is taken, completed and cancelled", move || {
        let (queue, answers) = queue();
        submit(&queue, &answers, 0);
        let cancelling = {
            let queue = queue.clone();
            thread::spawn(move || queue.cancel(id(0)))
        };
        let taken = queue.take();
        assert!(taken.cancelled.is_empty(), "it is not known to the taker yet");
        let began = !taken.begun.is_empty();
        for mut operation in taken.begun {
            queue.complete(&mut operation, Ok(None));
        }
        cancelling.join().unwrap();
        let rest = queue.take();
        assert!(rest.begun.is_empty(), "it is taken once");
        assert!(rest.cancelled.is_empty() || began && rest.cancelled == [id(0)]);
        assert_eq!(answers.of(0), 1);
        let kind = if began { &met.1 } else { &met.0 };
        kind.fetch_add(1, CounterOrdering::Relaxed);
    });
    for count in [before, after] {
        assert!(count.load(CounterOrdering::Relaxed) > 0, "both were met");
    }
}

#[test]
fn a_backend_is_told_to_cancel_only_what_is_not_complete() {
    explore("backend queue: an operation is cancelled once it was answered", || {
        let (queue, answers) = queue();
        submit(&queue, &answers, 0);
        let mut begun = queue.take().begun;
        let cancelling = {
            let (queue, answers) = (queue.clone(), answers.clone());
            thread::spawn(move || {
                let answered = answers.of(0) == 1;
                queue.cancel(id(0));
                answered
            })
        };
        queue.complete(&mut begun[0], Ok(None));
        let answered_before = cancelling.join().unwrap();
        assert!(!answered_before || queue.take().cancelled.is_empty(), "it was over when it was cancelled");
        assert_eq!(answers.of(0), 1);
    });
}

#[test]
fn an_operation_that_comes_while_its_backend_closes_is_answered_once() {
    explore("backend queue: two operations come, it closes", || {
        let (queue, answers) = queue();
        let submitting = [0, 1].map(|slot| {
            let (queue, answers) = (queue.clone(), answers.clone());
            thread::spawn(move || submit(&queue, &answers, slot))
        });
        queue.close();
        submitting.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!([0, 1].map(|slot| answers.of(slot)), [1, 1]);
        assert!(queue.take().begun.is_empty(), "nothing is left to do");
    });
}
