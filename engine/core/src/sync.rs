//! Locks and atomics of the state that threads share without a common lock: epochs, gates, deferred requests,
//! mailboxes, backend queues.
//!
//! They are std's. With `--cfg loom` they are loom's, and `models` runs all interleavings of a few threads.

#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};

#[cfg(loom)]
pub(crate) use modelled::{Condvar, Mutex, MutexGuard, atomic};

use std::sync::PoisonError;

/// Locks a mutex whose data no panic can leave half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(loom)]
mod modelled {
    pub(crate) use loom::sync::{Condvar, MutexGuard};

    /// loom's mutex with a default value.
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Mutex<T> {
            Mutex(loom::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> std::sync::LockResult<MutexGuard<'_, T>> {
            self.0.lock()
        }
    }

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Mutex<T> {
            Mutex::new(T::default())
        }
    }

    /// Atomics with sequentially consistent `SeqCst` accesses. loom implements `SeqCst` loads and stores weaker than
    /// the standard, as it documents. It implements read-modify-write operations correctly: they see the last value
    /// written. So each `SeqCst` load and store is such an operation here, and all of them have one total order, as
    /// `SeqCst` requires. (Fences around each access are not enough: another thread may run between fence and access.)
    pub(crate) mod atomic {
        pub(crate) use loom::sync::atomic::Ordering;

        macro_rules! atomic {
            ($name:ident, $value:ty, $nothing:expr, $($change:ident),*) => {
                #[derive(Default)]
                pub(crate) struct $name(loom::sync::atomic::$name);

                #[allow(dead_code, reason = "not every type needs every access")]
                impl $name {
                    pub fn new(value: $value) -> $name {
                        $name(loom::sync::atomic::$name::new(value))
                    }

                    pub fn load(&self, order: Ordering) -> $value {
                        if order == Ordering::SeqCst { self.0.fetch_or($nothing, order) } else { self.0.load(order) }
                    }

                    pub fn store(&self, value: $value, order: Ordering) {
                        if order == Ordering::SeqCst {
                            let _before = self.0.swap(value, order);
                        } else {
                            self.0.store(value, order);
                        }
                    }

                    $(pub fn $change(&self, value: $value, order: Ordering) -> $value {
                        self.0.$change(value, order)
                    })*
                }
            };
        }

        atomic!(AtomicBool, bool, false, swap);
        atomic!(AtomicU8, u8, 0, swap);
        atomic!(AtomicI64, i64, 0, fetch_add, fetch_sub, fetch_max);
        atomic!(AtomicU64, u64, 0, fetch_add, fetch_sub);
        atomic!(AtomicUsize, usize, 0, fetch_add, fetch_sub);

        impl AtomicI64 {
            pub fn fetch_update(
                &self,
                set: Ordering,
                fetch: Ordering,
                change: impl FnMut(i64) -> Option<i64>,
            ) -> Result<i64, i64> {
                self.0.fetch_update(set, fetch, change)
            }
        }
    }
}
