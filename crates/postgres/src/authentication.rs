//! Logging in: the answers to the server's authentication requests.
//!
//! trust, cleartext password, md5, SCRAM-SHA-256 and SCRAM-SHA-256-PLUS. With `channel_binding=require` only the
//! last one is done, because every other one would tell a man in the middle something.
//! <https://www.postgresql.org/docs/current/sasl-authentication.html>

use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;

use crate::config::{ChannelBinding, Target};

const BINDING_REQUIRED: &str = "channel_binding=require, but the server did not bind the login to the TLS channel; \
     use SCRAM over TLS, or channel_binding=prefer";

/// One login in progress.
pub(crate) struct Login<'a> {
    target: &'a Target,
    /// Digest of the server's certificate, where the channel is TLS.
    end_point: Option<Vec<u8>>,
    scram: Option<ScramSha256>,
    /// Whether the server has proven, by SCRAM, that it knows the password, on this very channel.
    bound: bool,
    /// Whether SCRAM has begun, and whether it has ended as it must.
    scram_verified: Option<bool>,
}

impl<'a> Login<'a> {
    pub(crate) fn new(target: &'a Target, end_point: Option<Vec<u8>>) -> Self {
        Login { target, end_point, scram: None, bound: false, scram_verified: None }
    }

    /// Answers one message of the server. An error says why, and what to do.
    pub(crate) fn answer(&mut self, message: Message, output: &mut BytesMut) -> Result<(), String> {
        let broken = |error: std::io::Error| format!("authentication failed: {error}");
        match message {
            Message::AuthenticationOk => self.finished(),
            Message::AuthenticationCleartextPassword => {
                let password = self.unbound_password()?;
                frontend::password_message(password, output).map_err(broken)
            }
            Message::AuthenticationMd5Password(body) => {
                let password = self.unbound_password()?;
                let hash = md5_hash(self.target.user.as_bytes(), password, body.salt());
                frontend::password_message(hash.as_bytes(), output).map_err(broken)
            }
            Message::AuthenticationSasl(body) => self.begin_scram(&body, output),
            Message::AuthenticationSaslContinue(body) => {
                let scram = self
                    .scram
                    .as_mut()
                    .ok_or("the server goes on with a SASL exchange that did not begin")?;
                scram.update(body.data()).map_err(broken)?;
                frontend::sasl_response(scram.message(), output).map_err(broken)
            }
            Message::AuthenticationSaslFinal(body) => {
                let scram =
                    self.scram.as_mut().ok_or("the server ends a SASL exchange that did not begin")?;
                scram.finish(body.data()).map_err(broken)?;
                self.scram_verified = Some(true);
                Ok(())
            }
            _ => Err(
                "the server asks for a way to log in that Millrace does not have (GSSAPI, SSPI or newer); \
                      use scram-sha-256, md5, password, cert or trust in pg_hba.conf"
                    .into(),
            ),
        }
    }

    fn finished(&self) -> Result<(), String> {
        if self.scram_verified == Some(false) {
            return Err(
                "the server ended the SCRAM exchange without proving that it knows the password".into()
            );
        }
        let bound = self.bound && self.scram_verified == Some(true);
        if self.target.channel_binding == ChannelBinding::Require && !bound {
            return Err(BINDING_REQUIRED.into());
        }
        Ok(())
    }

    fn password(&self) -> Result<&'a [u8], String> {
        match &self.target.password {
            Some(password) => Ok(password.reveal().as_bytes()),
            None => Err("the server asks for a password and there is none: set PGPASSWORD, ~/.pgpass, \
                         or the password in [postgres] url"
                .into()),
        }
    }

    /// The password for a method without channel binding.
    fn unbound_password(&self) -> Result<&'a [u8], String> {
        match self.target.channel_binding {
            ChannelBinding::Require => Err(BINDING_REQUIRED.into()),
            _ => self.password(),
        }
    }

    fn begin_scram(&mut self, body: &AuthenticationSaslBody, output: &mut BytesMut) -> Result<(), String> {
        let mechanisms: Vec<&str> = body.mechanisms().collect().map_err(|error| error.to_string())?;
        let end_point = match self.target.channel_binding {
            ChannelBinding::Disable => None,
            _ => self.end_point.take(),
        };
        let (mechanism, binding) = match end_point {
            Some(digest) if mechanisms.contains(&SCRAM_SHA_256_PLUS) => {
                self.bound = true;
                (SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(digest))
            }
            // Says "I could have", so that a server that could too notices somebody who took its offer away.
            Some(_) => (SCRAM_SHA_256, sasl::ChannelBinding::unrequested()),
            None => (SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
        };
        if !mechanisms.contains(&mechanism) {
            return Err(format!(
                "the server offers {} and Millrace has SCRAM-SHA-256",
                mechanisms.join(", ")
            ));
        }
        let password = if self.bound { self.password()? } else { self.unbound_password()? };
        let scram = self.scram.insert(ScramSha256::new(password, binding));
        self.scram_verified = Some(false);
        frontend::sasl_initial_response(mechanism, scram.message(), output).map_err(|error| error.to_string())
    }
}
