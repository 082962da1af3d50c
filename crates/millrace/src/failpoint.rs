//! Ends the process where a test wants it to end. Not in release builds.

/// The process is at `stage`. In a debug build it dies there, without any clean-up, if `$FAILPOINT` names the stage.
pub(crate) fn reached(stage: &str) {
    if cfg!(debug_assertions) && std::env::var("FAILPOINT").is_ok_and(|wanted| wanted == stage) {
        std::process::abort();
    }
}
