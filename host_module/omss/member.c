// SPDX-License-Identifier: GPL-2.0-only
/*
 * A socket that takes part in a session, and how it leaves when it is closed.
 *
 * An attached session must end with its source, and a sink leave when it is closed,
 * so neither may be kept open by us: a member holds the struct sock, not the file.
 * Who uses the socket takes a reference to its file for that moment, which fails
 * once it is being closed: so no close can come in the midst of a send, nor has it
 * to wait for one (if ours is the last reference, the kernel closes it later). A
 * single datagram does without: it uses the struct sock alone (datagram.c).
 *
 * To hear of a close we put a copy of the protocol's proto_ops in place whose
 * release() is ours. Overriding sk_prot->close(), as sockmap does, would do too, but
 * here the kernel counts: it drops the reference to proto_ops.owner, this module,
 * after release() has returned. Should someone replace the proto_ops over ours
 * (IPV6_ADDRFORM does), we hear of the close when we next want the file, and of TCP's
 * end by the ULP: no more than that the news is late.
 *
 * The ULP's place is taken so that nothing (kTLS, sockmap) can stack itself upon our
 * callbacks: they could never be removed from beneath it.
 */
#include <linux/module.h>
#include <linux/net.h>
#include <linux/rcupdate.h>
#include <linux/udp.h>
#include <net/inet_common.h>
#include <net/inet_connection_sock.h>
#include <net/ipv6.h>
#include <net/tcp.h>
#include "compat.h"
#include "omss.h"

struct closing_ops {
	struct proto_ops ops;
	const struct proto_ops *original;
};

/* IPv4 and IPv6, TCP and UDP; filled when first needed. */
static struct closing_ops closing_ops[4];
static DEFINE_MUTEX(closing_ops_lock);

static void state_changed(struct sock *sk);

/*
 * The member behind a socket; under RCU. sk_user_data may be another's, but then the
 * callback is not ours: that was restored before the other could come.
 */
static struct omss_member *member_of(struct sock *sk)
{
	struct omss_member *member = rcu_dereference_sk_user_data(sk);

	smp_rmb(); /* pairs with the locks around attach() and omss_member_detach() */
	return READ_ONCE(sk->sk_state_change) == state_changed ? member : NULL;
}

static void wake(struct omss_member *member)
{
	if (member->role == OMSS_ROLE_SOURCE)
		omss_task_queue(&member->session->task);
	else
		omss_sink_wake(container_of(member, struct omss_sink, member));
}

/* Whether it is a member. */
static bool wake_socket(struct sock *sk)
{
	struct omss_member *member;

	rcu_read_lock();
	member = member_of(sk);
	if (member)
		wake(member);
	rcu_read_unlock();
	return member;
}

/* The owner must not read from a source: it is not told that there is something. */
static void data_ready(struct sock *sk)
{
	if (!wake_socket(sk) && READ_ONCE(sk->sk_data_ready) != data_ready)
		sk->sk_data_ready(sk);
}

static void state_changed(struct sock *sk)
{
	void (*theirs)(struct sock *sk) = NULL;
	struct omss_member *member;

	rcu_read_lock();
	member = member_of(sk);
	if (member) {
		wake(member);
		theirs = member->state_change;
	}
	rcu_read_unlock();
	if (!theirs && READ_ONCE(sk->sk_state_change) != state_changed)
		theirs = sk->sk_state_change;
	if (theirs)
		theirs(sk);
}

static bool waits(const struct omss_member *member)
{
	return READ_ONCE(container_of(member, struct omss_sink, member)->blocked);
}

/* UDP calls this for each packet that has left: only who waits is woken. */
static void write_space(struct sock *sk)
{
	void (*theirs)(struct sock *sk) = NULL;
	struct omss_member *member;

	rcu_read_lock();
	member = member_of(sk);
	if (member) {
		theirs = member->write_space;
		if (waits(member) && omss_writeable(sk))
			wake(member);
	}
	rcu_read_unlock();
	if (!theirs && READ_ONCE(sk->sk_write_space) != write_space)
		theirs = sk->sk_write_space;
	if (theirs)
		theirs(sk);
}

bool omss_writeable(struct sock *sk)
{
	return sk_is_tcp(sk) ? sk_stream_is_writeable(sk) : sock_writeable(sk);
}

/* A TCP socket whose close we have missed is gone for good. */
static void ulp_release(struct sock *sk)
{
	wake_socket(sk);
}

/* Not registered: nobody can ask for it. */
static struct tcp_ulp_ops ulp = {
	.name = "omss",
	.owner = THIS_MODULE,
	.release = ulp_release,
};

static int release(struct socket *sock)
{
	const struct proto_ops *original;
	struct omss_session *session = NULL;
	struct omss_member *member;

	original = container_of(sock->ops, struct closing_ops, ops)->original;
	rcu_read_lock();
	member = member_of(sock->sk);
	if (member && refcount_inc_not_zero(&member->session->users))
		session = member->session;
	rcu_read_unlock();
	if (session) {
		omss_session_closed(member, session);
		omss_session_put(session);
	}
	return original->release(sock);
}

static bool known(const struct proto_ops *ops)
{
#if IS_ENABLED(CONFIG_IPV6)
	if (ops->release == inet6_release)
		return true;
#endif
	return ops->release == inet_release;
}

static struct closing_ops *closing(const struct proto_ops *original)
{
	struct closing_ops *found = NULL;
	unsigned int i;

	mutex_lock(&closing_ops_lock);
	for (i = 0; i < ARRAY_SIZE(closing_ops) && !found; i++) {
		if (!closing_ops[i].original && known(original)) {
			closing_ops[i].ops = *original;
			closing_ops[i].ops.release = release;
			closing_ops[i].ops.owner = THIS_MODULE;
			closing_ops[i].original = original;
		}
		if (closing_ops[i].original == original)
			found = &closing_ops[i];
	}
	mutex_unlock(&closing_ops_lock);
	return found;
}

static bool is_ours(const struct proto_ops *ops)
{
	return ops->release == release;
}

/* Why this socket cannot take part; under its lock. */
static int refused_stream(const struct sock *sk, enum omss_role role)
{
	int states = TCPF_ESTABLISHED | TCPF_CLOSE_WAIT;

	if (inet_csk(sk)->icsk_ulp_ops)
		return inet_csk(sk)->icsk_ulp_ops == &ulp ? -EBUSY : -EOPNOTSUPP;
	if (tcp_sk(sk)->repair)
		return -EOPNOTSUPP;
	if (role == OMSS_ROLE_SOURCE)
		states |= TCPF_FIN_WAIT1 | TCPF_FIN_WAIT2;
	else if (sk->sk_shutdown & SEND_SHUTDOWN)
		return -ENOTCONN;
	return BIT(sk->sk_state) & states ? 0 : -ENOTCONN;
}

static int refused_datagrams(const struct sock *sk, enum omss_role role)
{
	if (READ_ONCE(udp_sk(sk)->encap_type) || udp_test_bit(GRO_ENABLED, sk))
		return -EOPNOTSUPP;
	if (role == OMSS_ROLE_SOURCE)
		return inet_sk(sk)->inet_num ? 0 : -ENOTCONN;
	return sk->sk_state == TCP_ESTABLISHED ? 0 : -ENOTCONN;
}

static int refused(const struct sock *sk, enum omss_role role)
{
	if (!sk || !sk_is_inet(sk))
		return -EOPNOTSUPP;
	if (!ns_capable(sock_net(sk)->user_ns, CAP_NET_ADMIN))
		return -EPERM;
	if (sk_is_tcp(sk))
		return refused_stream(sk, role);
	if (sk->sk_type == SOCK_DGRAM && sk->sk_protocol == IPPROTO_UDP)
		return refused_datagrams(sk, role);
	return -EOPNOTSUPP;
}

/* Under the socket's lock; the callbacks run from here on. */
static int attach(struct omss_member *member, struct socket *sock)
{
	struct sock *sk = sock->sk;
	int err = 0;

	write_lock_bh(&sk->sk_callback_lock);
	if (READ_ONCE(sk->sk_user_data)) {
		err = -EBUSY;
	} else {
		member->data_ready = sk->sk_data_ready;
		member->state_change = sk->sk_state_change;
		member->write_space = sk->sk_write_space;
		rcu_assign_sk_user_data(sk, member);
		smp_wmb(); /* member_of() */
		WRITE_ONCE(sk->sk_state_change, state_changed);
		if (member->role == OMSS_ROLE_SOURCE)
			WRITE_ONCE(sk->sk_data_ready, data_ready);
		else
			WRITE_ONCE(sk->sk_write_space, write_space);
	}
	write_unlock_bh(&sk->sk_callback_lock);
	return err;
}

/* The caller holds the socket's file, and has set the member's role and session. */
int omss_member_attach(struct omss_member *member, struct socket *sock)
{
	struct closing_ops *ops;
	struct sock *sk = sock->sk;
	int err;

	if (!sk)
		return -EOPNOTSUPP;
	lock_sock(sk);
	err = refused(sk, member->role);
	if (err)
		goto out;
	err = -EBUSY;
	if (is_ours(sock->ops))
		goto out;
	err = -EOPNOTSUPP;
	ops = closing(sock->ops);
	if (!ops)
		goto out;
	member->sk = sk;
	member->stream = sk_is_tcp(sk);
	err = attach(member, sock);
	if (err)
		goto out;
	sock_hold(sk);
	__module_get(THIS_MODULE);
	WRITE_ONCE(sock->ops, &ops->ops);
	if (member->stream) {
		__module_get(THIS_MODULE);
		inet_csk(sk)->icsk_ulp_ops = &ulp;
	}
out:
	release_sock(sk);
	return err;
}

static void restore_callbacks(struct omss_member *member)
{
	struct sock *sk = member->sk;

	write_lock_bh(&sk->sk_callback_lock);
	if (sk->sk_data_ready == data_ready)
		WRITE_ONCE(sk->sk_data_ready, member->data_ready);
	if (sk->sk_write_space == write_space)
		WRITE_ONCE(sk->sk_write_space, member->write_space);
	WRITE_ONCE(sk->sk_state_change, member->state_change);
	smp_wmb(); /* member_of() */
	rcu_assign_sk_user_data(sk, NULL);
	write_unlock_bh(&sk->sk_callback_lock);
}

/* Unless someone else has replaced them. */
static void restore_ops(struct socket *sock)
{
	if (is_ours(sock->ops))
		WRITE_ONCE(sock->ops,
			   container_of(sock->ops, struct closing_ops, ops)->original);
}

/*
 * Someone else is closing the socket, and our release() is yet to come, or waits for the
 * session's lock. If it is an orphan already our release() was taken away, or it would
 * have come first.
 */
static bool will_be_released(struct sock *sk)
{
	const struct proto_ops *ops;
	struct socket *sock;

	rcu_read_lock();
	sock = READ_ONCE(sk->sk_socket);
	ops = sock ? READ_ONCE(sock->ops) : NULL;
	rcu_read_unlock();
	return ops && is_ours(ops);
}

/*
 * The socket is its owner's again. `closing`: this is its release(), after which the
 * kernel drops the reference that its proto_ops have to us.
 */
void omss_member_detach(struct omss_member *member, bool closing)
{
	struct sock *sk = member->sk;
	struct file *file = closing ? NULL : omss_file(sk);
	bool put_ops = !closing, put_ulp = false;

	lock_sock(sk);
	restore_callbacks(member);
	if (file)
		restore_ops(sk->sk_socket);
	else if (!closing)
		put_ops = !will_be_released(sk);
	if (member->stream && inet_csk(sk)->icsk_ulp_ops == &ulp) {
		inet_csk(sk)->icsk_ulp_ops = NULL;
		put_ulp = true;
	}
	release_sock(sk);
	if (put_ulp)
		module_put(THIS_MODULE);
	if (put_ops)
		module_put(THIS_MODULE);
	if (file)
		fput(file);
	if (member->held)
		fput(member->held);
	member->held = NULL;
	sock_put(sk);
}

/* Under RCU, for as long as that, or a reference to its session. */
struct omss_member *omss_member_of(struct sock *sk)
{
	return member_of(sk);
}

/*
 * A reference to the file of a socket, or NULL if that is being closed. Under RCU a
 * socket that is not an orphan is still there, and so is its file's memory.
 */
struct file *omss_file(struct sock *sk)
{
	struct socket *sock;
	struct file *file;

	rcu_read_lock();
	sock = READ_ONCE(sk->sk_socket);
	file = sock ? omss_get_file(sock) : NULL;
	rcu_read_unlock();
	if (file && (file->private_data != sock || READ_ONCE(sk->sk_socket) != sock)) {
		fput(file);
		return NULL;
	}
	return file;
}

/*
 * The module goes. Nobody refers to it any more, but someone may have read a pointer
 * to a callback, or to our proto_ops, before it was restored: in softirq, or in a task
 * that was preempted since.
 */
void omss_members_stop(void)
{
	synchronize_rcu();
	synchronize_rcu_tasks();
}
