//! Filter whose treatment of reads, and of operations that change data, is set at any time.

use std::sync::atomic::{AtomicU8, Ordering};

use blkloom_io::Errno;

use super::{Asked, Filter, Verdict};
use crate::stats::Op;

/// What happens to a class of operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Treatment {
    Pass,
    /// EIO.
    Fail,
    /// Succeeds without an effect. For reads: as `Pass`.
    Drop,
    Elsewhere,
    /// As `Pass`, but a read that fails then goes elsewhere.
    Try,
}

impl Treatment {
    const ALL: [Treatment; 5] =
        [Treatment::Pass, Treatment::Fail, Treatment::Drop, Treatment::Elsewhere, Treatment::Try];

    pub(super) fn verdict(self, op: Op) -> Verdict {
        match self {
            Treatment::Drop if op.writes() => Verdict::Drop,
            Treatment::Pass | Treatment::Drop | Treatment::Try => Verdict::Pass,
            Treatment::Fail => Verdict::Fail(Errno::IO),
            Treatment::Elsewhere => Verdict::Elsewhere,
        }
    }
}

pub struct Switch([AtomicU8; 2]);

impl Switch {
    pub fn new(reads: Treatment, others: Treatment) -> Switch {
        Switch([AtomicU8::new(reads as u8), AtomicU8::new(others as u8)])
    }

    /// Requests that have passed already go on.
    pub fn set(&self, reads: Treatment, others: Treatment) {
        self.0[0].store(reads as u8, Ordering::Relaxed);
        self.0[1].store(others as u8, Ordering::Relaxed);
    }
}

impl Filter for Switch {
    fn decide(&self, op: Op, _at: u64, len: u64, _asked: Asked) -> (Verdict, u64) {
        let treatment = Treatment::ALL[usize::from(self.0[usize::from(op.writes())].load(Ordering::Relaxed))];
        (treatment.verdict(op), len)
    }

    fn retries_elsewhere(&self) -> bool {
        self.0[0].load(Ordering::Relaxed) == Treatment::Try as u8
    }

    fn fails_flush(&self) -> Option<Errno> {
        (self.0[1].load(Ordering::Relaxed) == Treatment::Fail as u8).then_some(Errno::IO)
    }
}
