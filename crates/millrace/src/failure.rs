//! How a command ends when it does not end well: what is printed, and the exit code that scripts and unit files
//! decide on.

use std::fmt;
use std::process::ExitCode;

use change::Refusal;

/// The exit code for what could not be done.
pub(crate) const COULD_NOT: u8 = 2;

/// Why a command did not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The stores differ, or the time was up. The command has said what there is to say.
    Different,
    /// It could not be done; trying again may help.
    Failed(anyhow::Error),
    /// Refused, with what mends it.
    Refused(Vec<Refusal>),
    /// Others of the same kind fence this one again and again.
    Fenced(String),
}

/// What the commands return.
pub(crate) type Outcome = Result<(), Failure>;

impl Failure {
    /// The Contract's exit code.
    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::Different => 1,
            Failure::Failed(_) => COULD_NOT,
            Failure::Refused(_) => 3,
            Failure::Fenced(_) => 4,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Different => Ok(()),
            // With its causes, outermost first.
            Failure::Failed(error) => writeln!(f, "error: {error:#}"),
            Failure::Refused(refusals) => {
                refusals.iter().try_for_each(|refusal| writeln!(f, "error: {refusal}"))
            }
            Failure::Fenced(what) => {
                writeln!(
                    f,
                    "error: {what}\n  remedy: stop all but one; there is one reader of a pipeline, and one worker of a kind on a host"
                )
            }
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Failure::Refused(vec![refusal])
    }
}

impl From<Vec<Refusal>> for Failure {
    fn from(refusals: Vec<Refusal>) -> Self {
        Failure::Refused(refusals)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Failure::Failed(error)
    }
}
