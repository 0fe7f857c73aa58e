//! Which devices may stand on which: none on itself, and no more than `MOST_LEVELS` on one another, so
//! that walks from device to device end, on any thread's stack.
//!
//! A device knows those below it by its map, and those above it by `users`: weakly, and as they were at
//! some time; whoever asks weeds out those that have changed their map since. Maps are published one at a
//! time in the whole process, for two at once could close a circle that neither sees.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use crate::device::{Device, Mapping, SuspendError};
use crate::lock;

pub const MOST_LEVELS: usize = 32;

static PUBLISHING: Mutex<()> = Mutex::new(());

/// Devices whose maps name this one, or once did.
#[derive(Default)]
pub struct Users(Mutex<Vec<Weak<Device>>>);

impl Users {
    /// Those that still do.
    fn now(&self, of: &Device) -> Vec<Arc<Device>> {
        let mut users = lock(&self.0);
        let mut found: Vec<Arc<Device>> = Vec::new();
        users.retain(|user| {
            let user = user.upgrade().filter(|user| !found.iter().any(|known| Arc::ptr_eq(known, user)));
            let user = user.filter(|user| user.mapping.load().as_ref().is_some_and(|mapping| mapping.names(of)));
            found.extend(user.clone());
            user.is_some()
        });
        found
    }
}

/// Makes `mapping` the device's, and returns the one before.
pub fn publish(device: &Arc<Device>, mapping: Arc<Mapping>) -> Result<Option<Arc<Mapping>>, SuspendError> {
    let _one_at_a_time = lock(&PUBLISHING);
    let below = levels_below(&mapping, device, &mut HashMap::new()).ok_or(SuspendError::Cycle)?;
    let levels = levels_above(device, &mut HashMap::new()) + 1 + below;
    if levels > MOST_LEVELS {
        return Err(SuspendError::TooDeep(levels));
    }
    let old = device.mapping.swap(Some(mapping.clone()));
    for lower in &mapping.lower {
        // Asked for the weeding: the list must not grow with every swap.
        if !lower.users.now(lower).iter().any(|user| Arc::ptr_eq(user, device)) {
            lock(&lower.users.0).push(Arc::downgrade(device));
        }
    }
    Ok(old)
}

/// How many levels of devices are below a map. None: `device` is among them.
fn levels_below(mapping: &Mapping, device: &Device, known: &mut HashMap<*const Device, usize>) -> Option<usize> {
    let mut most = 0;
    for lower in &mapping.lower {
        if std::ptr::eq(&**lower, device) {
            return None;
        }
        let levels = match known.get(&Arc::as_ptr(lower)) {
            Some(levels) => *levels,
            None => {
                let below = lower.mapping.load_full();
                let levels = 1 + below.map_or(Some(0), |below| levels_below(&below, device, known))?;
                known.insert(Arc::as_ptr(lower), levels);
                levels
            }
        };
        most = most.max(levels);
    }
    Some(most)
}

fn levels_above(device: &Device, known: &mut HashMap<*const Device, usize>) -> usize {
    let mut most = 0;
    for user in device.users.now(device) {
        let levels = match known.get(&Arc::as_ptr(&user)) {
            Some(levels) => *levels,
            None => {
                let levels = 1 + levels_above(&user, known);
                known.insert(Arc::as_ptr(&user), levels);
                levels
            }
        };
        most = most.max(levels);
    }
    most
}
