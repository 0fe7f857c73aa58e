//! Checks of stacked devices: no device reaches itself, and a stack has at most `MOST_LEVELS` levels. So every
//! recursion from device to device ends, on any thread's stack.
//!
//! A device's map names the devices below it. `users` names the devices above it, by weak references that may be out of
//! date: a reader removes the devices whose map has changed since. The process publishes one map at a time, because two
//! maps published at once could form a cycle that neither check sees.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, Weak};

use crate::device::{Device, Mapping, SwapError};
use crate::lock;

pub const MOST_LEVELS: usize = 32;

static PUBLISHING: Mutex<()> = Mutex::new(());

/// Devices whose maps name this device now, or did so before.
#[derive(Default)]
pub struct Users(Mutex<Vec<Weak<Device>>>);

impl Users {
    /// The devices whose maps name device `of` now.
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

/// Replaces the device's mapping and returns the old one. Fails if the new mapping makes a cycle or too deep a stack.
pub fn publish(device: &Arc<Device>, mapping: Arc<Mapping>) -> Result<Option<Arc<Mapping>>, SwapError> {
    let _one_at_a_time = lock(&PUBLISHING);
    let below = levels_below(&mapping, device, &mut HashMap::new()).ok_or(SwapError::Cycle)?;
    let levels = levels_above(device, &mut HashMap::new()) + 1 + below;
    if levels > MOST_LEVELS {
        return Err(SwapError::TooDeep(levels));
    }
    let old = device.mapping.swap(Some(mapping.clone()));
    for lower in &mapping.lower {
        // `now` also removes old users: the list must not grow with every swap.
        if !lower.users.now(lower).iter().any(|user| Arc::ptr_eq(user, device)) {
            lock(&lower.users.0).push(Arc::downgrade(device));
        }
    }
    Ok(old)
}

/// Number of levels of devices below a map. None: `device` is one of them.
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

/// Calls `visit` once for each device below `device`.
pub fn visit_below(device: &Device, seen: &mut HashSet<*const Device>, visit: &dyn Fn(&Device)) {
    let Some(mapping) = device.mapping.load_full() else { return };
    for lower in &mapping.lower {
        if seen.insert(Arc::as_ptr(lower)) {
            visit(lower);
            visit_below(lower, seen, visit);
        }
    }
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
