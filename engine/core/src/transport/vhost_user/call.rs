//! `Call`: the eventfd by which a driver learns of used buffers. The other program may replace it at any time.

use std::os::fd::OwnedFd;
use std::sync::Mutex;

use blkloom_io::Signal;

use crate::lock;

#[derive(Default)]
struct State {
    event: Option<Signal>,
    /// The last time failed, and the log has it.
    failed: bool,
}

#[derive(Default)]
pub struct Call(Mutex<State>);

impl Call {
    /// Replaces the eventfd. None: the driver polls. A driver that has been called by the former one may have missed
    /// that, so it is called again.
    pub fn replace(&self, event: Option<OwnedFd>) -> std::io::Result<()> {
        lock(&self.0).event = event.map(Signal::new).transpose()?;
        self.raise();
        Ok(())
    }

    pub(super) fn raise(&self) {
        let State { event, failed } = &mut *lock(&self.0);
        let Some(event) = event else { return };
        let raised = event.raise();
        if let Err(error) = &raised
            && !*failed
        {
            tracing::error!(%error, "a driver could not be told of used buffers");
        }
        *failed = raised.is_err();
    }
}
