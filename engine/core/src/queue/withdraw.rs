//! Withdrawal of waiting requests (at a gate, deferred or delayed), which another process will serve. Part of `queue`,
//! whose invariants hold here.

use std::collections::BTreeMap;

use super::task::leave;
use super::{Kind, Queue, Task};
use crate::request::{Owner, Request, TransportId};
use crate::stats::Op;
use crate::wake::TaskId;

impl Queue {
    /// Removes and returns those requests of `wanted` transports whose tasks all wait: at a gate, deferred, or for an
    /// instant. Parts of a request may be done already. The next server executes them again, which makes no difference
    /// to a client that has no answer yet.
    pub fn withdraw(&mut self, wanted: impl Fn(TransportId) -> bool) -> Vec<(TransportId, u64, Request)> {
        let mut waiting: BTreeMap<usize, Vec<TaskId>> = BTreeMap::new();
        // A read or a block status in a backend is cancelled.
        let waits = |task: &Task| match task.kind {
            Kind::Backend { .. } => matches!(self.actives[task.active].request.op, Op::Read | Op::Extents),
            _ => matches!(task.kind, Kind::Gate | Kind::Deferred { .. } | Kind::Wait { .. }),
        };
        for (slot, task) in self.tasks.iter().filter(|(_, task)| waits(task)) {
            waiting.entry(task.active).or_default().push(TaskId { slot, generation: task.generation });
        }
        waiting.retain(|&index, ids| {
            let active = &self.actives[index];
            let ours = matches!(active.request.owner, Owner::Transport { transport, .. } if wanted(transport));
            ours && ids.len() == active.tasks as usize
        });
        let mut withdrawn = Vec::with_capacity(waiting.len());
        for (index, ids) in waiting {
            let request = self.actives.remove(index).request;
            if let Owner::Transport { transport, token } = request.owner {
                withdrawn.push((transport, token, request));
            }
            ids.into_iter().filter_map(|id| self.take(id)).for_each(|task| leave(task.path));
        }
        withdrawn
    }
}
