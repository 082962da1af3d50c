//! TLS and logins, as librdkafka's properties name them: on OpenSSL as it is, so that keys with passwords, PKCS#12 files
//! and the names of ciphers mean the same to what reads and to what writes.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use change::Refusal;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::{SaslAuthenticateRequest, SaslAuthenticateResponse, SaslHandshakeRequest};
use kafka_protocol::protocol::StrBytes;
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkcs12::Pkcs12;
use openssl::pkey::PKey;
use openssl::rand::rand_bytes;
use openssl::ssl::{ConnectConfiguration, SslConnector, SslMethod, SslVerifyMode};
use openssl::x509::X509;
use openssl::x509::store::X509StoreBuilder;

use super::broker::{Broker, WireError};
use super::scram::Scram;
use crate::KafkaError;

const HANDSHAKE: i16 = 1;
const AUTHENTICATE: i16 = 1;
const NONCE_LEN: usize = 24;

/// Properties of TLS and logins that are kept to. Any other of `ssl.` or `sasl.` could ask for more safety than there
/// would be, and is refused.
const KNOWN: &[&str] = &[
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.password",
    "sasl.username",
    "ssl.ca.location",
    "ssl.ca.pem",
    "ssl.certificate.location",
    "ssl.certificate.pem",
    "ssl.cipher.suites",
    "ssl.curves.list",
    "ssl.endpoint.identification.algorithm",
    "ssl.key.location",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.location",
    "ssl.keystore.password",
    "ssl.sigalgs.list",
];

/// How the brokers are to be spoken to.
#[derive(Clone)]
pub(crate) struct Security {
    tls: Option<Tls>,
    login: Option<Login>,
}

#[derive(Clone)]
struct Tls {
    connector: SslConnector,
    verify: bool,
    check_name: bool,
}

#[derive(Clone)]
struct Login {
    mechanism: Mechanism,
    user: String,
    password: String,
}

#[derive(Clone, Copy)]
enum Mechanism {
    Plain,
    Scram(&'static str, fn() -> MessageDigest),
}

impl Mechanism {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "PLAIN" => Some(Mechanism::Plain),
            "SCRAM-SHA-256" => Some(Mechanism::Scram("SCRAM-SHA-256", MessageDigest::sha256)),
            "SCRAM-SHA-512" => Some(Mechanism::Scram("SCRAM-SHA-512", MessageDigest::sha512)),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Mechanism::Plain => "PLAIN",
            Mechanism::Scram(name, _) => name,
        }
    }
}

impl Security {
    /// What the properties say.
    pub(crate) fn new(properties: &BTreeMap<String, String>) -> Result<Self, Refusal> {
        let get = |name: &str| properties.get(name).map(String::as_str).filter(|value| !value.is_empty());
        let foreign = |name: &&String| {
            (name.starts_with("ssl.") || name.starts_with("sasl.")) && !KNOWN.contains(&name.as_str())
        };
        if let Some(name) = properties.keys().find(foreign) {
            return Err(Refusal::new(
                format!("[kafka.properties] sets `{name}`, which Millrace does not know to keep to"),
                format!("remove it; of TLS and logins there are: {}", KNOWN.join(", ")),
            ));
        }
        let protocol = get("security.protocol").unwrap_or("plaintext").to_lowercase();
        let (tls, login) = match protocol.as_str() {
            "plaintext" => (false, false),
            "ssl" => (true, false),
            "sasl_plaintext" => (false, true),
            "sasl_ssl" => (true, true),
            other => {
                return Err(Refusal::new(
                    format!("[kafka.properties] has security.protocol `{other}`"),
                    "one of plaintext, ssl, sasl_plaintext, sasl_ssl",
                ));
            }
        };
        let tls = tls.then(|| Tls::new(get)).transpose()?;
        let login = login.then(|| Login::new(get)).transpose()?;
        Ok(Security { tls, login })
    }

    /// What makes one TLS connection; `None` for a plain one.
    pub(super) fn tls(&self, host: &str) -> Result<Option<ConnectConfiguration>, KafkaError> {
        let Some(tls) = &self.tls else { return Ok(None) };
        match tls.connector.configure() {
            Ok(configuration) => Ok(Some(configuration.verify_hostname(tls.check_name))),
            Err(error) => Err(KafkaError::Unavailable(format!("cannot begin TLS with {host}: {error}"))),
        }
    }

    /// Whether a certificate that nobody vouches for ends the connection.
    pub(super) fn verifies(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.verify)
    }

    /// Logs in where there is something to log in with; tells how long that holds, if not for ever.
    pub(super) fn log_in(
        &self,
        broker: &mut Broker,
        deadline: Instant,
    ) -> Result<Option<Duration>, WireError> {
        let Some(login) = &self.login else { return Ok(None) };
        let refuse = |what: String| {
            KafkaError::Refused(Refusal::new(what, "correct the user and password in [kafka.properties]"))
        };
        let mechanism = login.mechanism.name();
        let handshake = SaslHandshakeRequest::default().with_mechanism(StrBytes::from_static_str(mechanism));
        let answer = broker.ask(&handshake, HANDSHAKE, deadline)?;
        if answer.error_code != 0 {
            let offered: Vec<&str> = answer.mechanisms.iter().map(|name| name.as_str()).collect();
            let what = format!(
                "{} does not offer {mechanism} to log in with (sasl.mechanism), but {}",
                broker.address(),
                offered.join(", ")
            );
            return Err(refuse(what).into());
        }
        let address = broker.address().to_owned();
        let mut say = |message: String| -> Result<SaslAuthenticateResponse, WireError> {
            let request = SaslAuthenticateRequest::default().with_auth_bytes(Bytes::from(message));
            let answer = broker.ask(&request, AUTHENTICATE, deadline)?;
            match ResponseError::try_from_code(answer.error_code) {
                None => Ok(answer),
                Some(error) => {
                    let reason = answer.error_message.as_deref().unwrap_or_default();
                    Err(refuse(format!("{address} did not let {} log in: {error} {reason}", login.user))
                        .into())
                }
            }
        };
        let last = match login.mechanism {
            Mechanism::Plain => say(format!("\0{}\0{}", login.user, login.password))?,
            Mechanism::Scram(_, digest) => {
                let scram = Scram::new(digest(), &login.user, &login.password, nonce().map_err(refuse)?);
                let answer = say(scram.first())?;
                let (message, proof) = scram.last(text(&answer.auth_bytes)).map_err(refuse)?;
                let answer = say(message)?;
                proof.check(text(&answer.auth_bytes)).map_err(refuse)?;
                answer
            }
        };
        let lifetime = u64::try_from(last.session_lifetime_ms).unwrap_or(0);
        Ok((lifetime > 0).then(|| Duration::from_millis(lifetime)))
    }
}

impl Tls {
    fn new<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Result<Self, Refusal> {
        let check_name = match get("ssl.endpoint.identification.algorithm") {
            None | Some("https") => true,
            Some("none") => false,
            Some(other) => {
                return Err(Refusal::new(
                    format!("[kafka.properties] has ssl.endpoint.identification.algorithm `{other}`"),
                    "https or none",
                ));
            }
        };
        let verify = !matches!(get("enable.ssl.certificate.verification"), Some("false" | "0" | "f"));
        let mut doing = "cannot begin TLS".to_owned();
        let connector = build(&get, verify, &mut doing).map_err(|error| {
            Refusal::new(format!("{doing}: {error}"), "correct the ssl. properties in [kafka.properties]")
        })?;
        Ok(Tls { connector, verify, check_name: check_name && verify })
    }
}

/// `doing` tells what failed.
fn build<'a>(
    get: &impl Fn(&str) -> Option<&'a str>,
    verify: bool,
    doing: &mut String,
) -> Result<SslConnector, Box<dyn std::error::Error>> {
    let mut builder = SslConnector::builder(SslMethod::tls_client())?;
    let mut found = |name: &str| {
        let value = get(name)?;
        // What a file's name or a PEM block says is no secret, but a password is not shown.
        *doing = match name {
            _ if name.ends_with(".location") => format!("{name} = {value}"),
            _ => name.to_owned(),
        };
        Some(value)
    };
    if !verify {
        builder.set_verify(SslVerifyMode::NONE);
    }
    if get("ssl.ca.location").or_else(|| get("ssl.ca.pem")).is_some() {
        // Those alone, not the system's as well.
        builder.set_cert_store(X509StoreBuilder::new()?.build());
    }
    if let Some(place) = found("ssl.ca.location") {
        match Path::new(place) {
            directory if directory.is_dir() => builder.load_verify_locations(None, Some(directory))?,
            file => builder.set_ca_file(file)?,
        }
    }
    if let Some(pem) = found("ssl.ca.pem") {
        for certificate in X509::stack_from_pem(pem.as_bytes())? {
            builder.cert_store_mut().add_cert(certificate)?;
        }
    }
    if let Some(file) = found("ssl.certificate.location") {
        builder.set_certificate_chain_file(file)?;
    }
    if let Some(pem) = found("ssl.certificate.pem") {
        let mut chain = X509::stack_from_pem(pem.as_bytes())?.into_iter();
        if let Some(own) = chain.next() {
            builder.set_certificate(&own)?;
        }
        chain.try_for_each(|certificate| builder.add_extra_chain_cert(certificate))?;
    }
    let key = match found("ssl.key.location") {
        Some(file) => Some(std::fs::read(file)?),
        None => found("ssl.key.pem").map(|pem| pem.as_bytes().to_vec()),
    };
    if let Some(pem) = key {
        let password = get("ssl.key.password").unwrap_or_default();
        builder.set_private_key(&*PKey::private_key_from_pem_passphrase(&pem, password.as_bytes())?)?;
    }
    if let Some(file) = found("ssl.keystore.location") {
        let store = std::fs::read(file)?;
        let password = get("ssl.keystore.password").unwrap_or_default();
        let store = Pkcs12::from_der(&store)?.parse2(password)?;
        if let (Some(certificate), Some(key)) = (store.cert, store.pkey) {
            builder.set_certificate(&certificate)?;
            builder.set_private_key(&key)?;
        }
        for certificate in store.ca.into_iter().flatten() {
            builder.add_extra_chain_cert(certificate)?;
        }
    }
    if let Some(suites) = found("ssl.cipher.suites") {
        builder.set_cipher_list(suites)?;
    }
    if let Some(curves) = found("ssl.curves.list") {
        builder.set_groups_list(curves)?;
    }
    if let Some(algorithms) = found("ssl.sigalgs.list") {
        builder.set_sigalgs_list(algorithms)?;
    }
    Ok(builder.build())
}

impl Login {
    fn new<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Result<Self, Refusal> {
        let name = get("sasl.mechanism").or_else(|| get("sasl.mechanisms")).unwrap_or("GSSAPI");
        let mechanism = Mechanism::parse(name).ok_or_else(|| {
            Refusal::new(
                format!("[kafka.properties] has sasl.mechanism {name}, with which Millrace cannot log in"),
                "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512; or certificates, with security.protocol `ssl`",
            )
        })?;
        let required = |name: &str| {
            get(name).map(str::to_owned).ok_or_else(|| {
                Refusal::new(
                    format!("[kafka.properties] lacks {name}"),
                    "add it, or change security.protocol",
                )
            })
        };
        Ok(Login { mechanism, user: required("sasl.username")?, password: required("sasl.password")? })
    }
}

fn nonce() -> Result<String, String> {
    let mut bytes = [0; NONCE_LEN];
    rand_bytes(&mut bytes).map_err(|error: ErrorStack| error.to_string())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(properties: &[(&str, &str)]) -> String {
        let properties =
            properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        match Security::new(&properties) {
            Ok(_) => panic!("{properties:?} was taken"),
            Err(refusal) => refusal.to_string(),
        }
    }

    #[test]
    fn what_cannot_be_kept_to_is_refused_by_name() {
        for (properties, named) in [
            (&[("security.protocol", "tls")][..], "`tls`"),
            (&[("security.protocol", "sasl_ssl"), ("sasl.mechanism", "OAUTHBEARER")], "OAUTHBEARER"),
            (&[("security.protocol", "sasl_plaintext"), ("sasl.mechanism", "PLAIN")], "sasl.username"),
            (&[("ssl.crl.location", "/x")], "ssl.crl.location"),
            (&[("security.protocol", "ssl"), ("ssl.ca.location", "/nowhere.pem")], "/nowhere.pem"),
            (&[("security.protocol", "ssl"), ("ssl.key.pem", "no key")], "ssl.key.pem"),
            (&[("security.protocol", "ssl"), ("ssl.endpoint.identification.algorithm", "dns")], "dns"),
        ] {
            let refusal = refused(properties);
            assert!(refusal.contains(named), "{refusal}");
        }
    }
}
