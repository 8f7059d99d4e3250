# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_ADMIN: _ClassVar[Role]
    ROLE_SUBMIT: _ClassVar[Role]
    ROLE_READ: _ClassVar[Role]
    ROLE_ENROL: _ClassVar[Role]
    ROLE_TRACKER: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_ADMIN: Role
ROLE_SUBMIT: Role
ROLE_READ: Role
ROLE_ENROL: Role
ROLE_TRACKER: Role

class EnrolRequest(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: str
    def __init__(self, device: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Identity(_message.Message):
    __slots__ = ("device", "certificate_pem", "private_key_pem", "ca_pem", "not_before_unix_s", "not_after_unix_s", "agents_port")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_KEY_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    AGENTS_PORT_FIELD_NUMBER: _ClassVar[int]
    device: str
    certificate_pem: bytes
    private_key_pem: bytes
    ca_pem: bytes
    not_before_unix_s: int
    not_after_unix_s: int
    agents_port: int
    def __init__(self, device: _Optional[str] = ..., certificate_pem: _Optional[bytes] = ..., private_key_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ..., not_before_unix_s: _Optional[int] = ..., not_after_unix_s: _Optional[int] = ..., agents_port: _Optional[int] = ...) -> None: ...

class JoinTrackerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrackerIdentity(_message.Message):
    __slots__ = ("ca_pem", "ca_private_key_pem", "admin_token")
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PRIVATE_KEY_PEM_FIELD_NUMBER: _ClassVar[int]
    ADMIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ca_pem: bytes
    ca_private_key_pem: bytes
    admin_token: str
    def __init__(self, ca_pem: _Optional[bytes] = ..., ca_private_key_pem: _Optional[bytes] = ..., admin_token: _Optional[str] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "user", "role", "device", "created_unix_s", "expires_unix_s", "revoked_unix_s", "used_unix_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    REVOKED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    USED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    user: str
    role: Role
    device: str
    created_unix_s: int
    expires_unix_s: int
    revoked_unix_s: int
    used_unix_s: int
    def __init__(self, id: _Optional[str] = ..., user: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., device: _Optional[str] = ..., created_unix_s: _Optional[int] = ..., expires_unix_s: _Optional[int] = ..., revoked_unix_s: _Optional[int] = ..., used_unix_s: _Optional[int] = ...) -> None: ...

class CreateTokenRequest(_message.Message):
    __slots__ = ("user", "role", "device", "lifetime_s")
    USER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    user: str
    role: Role
    device: str
    lifetime_s: int
    def __init__(self, user: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., device: _Optional[str] = ..., lifetime_s: _Optional[int] = ...) -> None: ...

class CreateTokenResponse(_message.Message):
    __slots__ = ("token", "secret", "agents_port")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    AGENTS_PORT_FIELD_NUMBER: _ClassVar[int]
    token: Token
    secret: str
    agents_port: int
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., secret: _Optional[str] = ..., agents_port: _Optional[int] = ...) -> None: ...

class ListTokensRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTokensResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class RevokeTokenRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Enrolled(_message.Message):
    __slots__ = ("device", "enrolled_unix_s", "not_after_unix_s", "revoked_unix_s")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    REVOKED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    device: str
    enrolled_unix_s: int
    not_after_unix_s: int
    revoked_unix_s: int
    def __init__(self, device: _Optional[str] = ..., enrolled_unix_s: _Optional[int] = ..., not_after_unix_s: _Optional[int] = ..., revoked_unix_s: _Optional[int] = ...) -> None: ...

class ListEnrolledRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListEnrolledResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Enrolled]
    def __init__(self, devices: _Optional[_Iterable[_Union[Enrolled, _Mapping]]] = ...) -> None: ...

class RevokeDeviceRequest(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: str
    def __init__(self, device: _Optional[str] = ...) -> None: ...
