//! `Process`: detects that the current process is a fork of the process that created an object.
//!
//! A forked child has the memory of its parent, but not its threads. Objects that need a thread, or a lock that a
//! thread may have held at the fork, must not be used there. A handler that the C library calls in the child counts the
//! forks. The counter is global, because a fork concerns the whole process.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

static FORKS: AtomicU32 = AtomicU32::new(0);
static COUNTED: Once = Once::new();

unsafe extern "C" {
    /// Source: pthread_atfork(3).
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> std::ffi::c_int;
}

extern "C" fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// Identifies a process among its ancestors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Process(u32);

impl Process {
    /// The current process.
    pub fn current() -> Process {
        COUNTED.call_once(|| {
            // SAFETY: the handler touches one atomic, which a child may do at any time. ENOMEM, the only error, leaves
            // forks uncounted: the program is about to fail for another reason.
            let _registered = unsafe { pthread_atfork(None, None, Some(forked)) };
        });
        Process(FORKS.load(Ordering::Relaxed))
    }

    /// False in a fork of that process.
    pub fn is_current(self) -> bool {
        FORKS.load(Ordering::Relaxed) == self.0
    }
}
