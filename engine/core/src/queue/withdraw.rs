//! Taking requests back that only wait, at gates or held: another process will serve them. Part of `queue`, whose
//! invariants hold here.

use std::collections::BTreeMap;

use super::task::leave;
use super::{Kind, Queue};
use crate::inbox::TaskId;
use crate::nbd::Ticket;
use crate::request::{Owner, Request};

impl Queue {
    /// Forgets the connections' requests that are `wanted` and that do nothing but wait, at gates or held. Parts
    /// of them may be done: whoever serves them anew does those once more, which changes nothing for a
    /// client that has no answer yet.
    pub fn withdraw(&mut self, wanted: impl Fn(&Ticket) -> bool) -> Vec<Request> {
        let mut waiting: BTreeMap<usize, Vec<TaskId>> = BTreeMap::new();
        for (slot, task) in self.tasks.iter().filter(|(_, task)| matches!(task.kind, Kind::Gate | Kind::Held { .. })) {
            waiting.entry(task.active).or_default().push(TaskId { slot, generation: task.generation });
        }
        waiting.retain(|&index, ids| {
            let active = &self.actives[index];
            let ours = matches!(&active.request.owner, Owner::Connection(ticket) if wanted(ticket));
            ours && ids.len() == active.tasks as usize
        });
        let mut withdrawn = Vec::with_capacity(waiting.len());
        for (index, ids) in waiting {
            withdrawn.push(self.actives.remove(index).request);
            ids.into_iter().filter_map(|id| self.take(id)).for_each(|task| leave(task.path));
        }
        withdrawn
    }
}
