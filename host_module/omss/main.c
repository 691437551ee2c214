// SPDX-License-Identifier: GPL-2.0-only
/* The door: socket options, and who may use them. */
#include <linux/module.h>
#include <linux/netfilter.h>
#include <linux/uaccess.h>
#include "compat.h"
#include "omss.h"

/* What the caller left out is 0; what we do not know must be. */
static int copy_call(void *call, size_t ours, sockptr_t from, unsigned int theirs)
{
	u8 rest[64];
	size_t at, part;

	if (!theirs || theirs > PAGE_SIZE)
		return -EINVAL;
	memset(call, 0, ours);
	if (copy_from_sockptr(call, from, min_t(size_t, ours, theirs)))
		return -EFAULT;
	for (at = ours; at < theirs; at += part) {
		part = min_t(size_t, theirs - at, sizeof(rest));
		if (copy_from_sockptr_offset(rest, from, at, part))
			return -EFAULT;
		if (memchr_inv(rest, 0, part))
			return -E2BIG;
	}
	return 0;
}

static int set_source(struct sock *sk, sockptr_t from, unsigned int length)
{
	struct omss_source call;

	return copy_call(&call, sizeof(call), from, length) ?: omss_set_source(sk, &call);
}

static int add_sink(struct sock *sk, sockptr_t from, unsigned int length)
{
	struct omss_add_sink call;

	return copy_call(&call, sizeof(call), from, length) ?: omss_add_sink(sk, &call);
}

static int remove_sink(struct sock *sk, sockptr_t from, unsigned int length)
{
	struct omss_remove_sink call;

	return copy_call(&call, sizeof(call), from, length) ?: omss_remove_sink(sk, &call);
}

static int end(struct sock *sk, sockptr_t from, unsigned int length)
{
	struct omss_end call;

	return copy_call(&call, sizeof(call), from, length) ?: omss_end(sk, call.session);
}

static int set_omss(struct sock *sk, int option, sockptr_t from, unsigned int length)
{
	if (!omss_may(sk))
		return -EPERM;
	if (!sk->sk_socket || !sk->sk_socket->file)
		return -EOPNOTSUPP;
	switch (option) {
	case OMSS_SET_SOURCE:
		return set_source(sk, from, length);
	case OMSS_ADD_SINK:
		return add_sink(sk, from, length);
	case OMSS_REMOVE_SINK:
		return remove_sink(sk, from, length);
	case OMSS_END:
		return end(sk, from, length);
	}
	return -ENOPROTOOPT;
}

static int copy_answer(char __user *to, int *length, const void *answer, size_t size)
{
	*length = min_t(size_t, *length, size);
	return copy_to_user(to, answer, *length) ? -EFAULT : 0;
}

static int hello(char __user *to, int *length)
{
	struct omss_hello answer = {
		.version = OMSS_VERSION,
		.hello_size = sizeof(struct omss_hello),
		.source_size = sizeof(struct omss_source),
		.add_size = sizeof(struct omss_add_sink),
		.remove_size = sizeof(struct omss_remove_sink),
		.end_size = sizeof(struct omss_end),
		.adopt_size = sizeof(struct omss_adopt),
		.request_size = sizeof(struct omss_request),
		.session_size = sizeof(struct omss_session_status),
		.sink_size = sizeof(struct omss_sink_status),
		.features = OMSS_FEATURES,
		.kernel = OMSS_KERNEL,
		.classes = OMSS_CLASSES,
		.max_ring = OMSS_MAX_RING,
		.max_entry = OMSS_MAX_ENTRY,
		.max_latency = OMSS_MAX_LATENCY,
		.max_sinks = READ_ONCE(omss_max_sinks),
		.workers = omss_workers(),
	};
	u32 version;

	if (get_user(version, (u32 __user *)to))
		return -EFAULT;
	if (copy_answer(to, length, &answer, sizeof(answer)))
		return -EFAULT;
	return version == OMSS_VERSION ? 0 : -EPROTO;
}

static int get_status(struct sock *sk, char __user *to, int *length)
{
	struct omss_request request;
	int written;

	if (*length < (int)sizeof(request))
		return -EINVAL;
	if (copy_from_user(&request, to, sizeof(request)))
		return -EFAULT;
	written = omss_get_status(sk, &request, to + sizeof(request), *length - sizeof(request));
	if (written < 0)
		return written;
	*length = sizeof(request) + written;
	return copy_to_user(to, &request, sizeof(request)) ? -EFAULT : 0;
}

static int adopt(struct sock *sk, char __user *to, int *length)
{
	struct omss_adopt call;
	int err;

	if (*length < (int)sizeof(call))
		return -EINVAL;
	if (copy_from_user(&call, to, sizeof(call)))
		return -EFAULT;
	err = omss_adopt(sk, &call);
	return err ?: copy_answer(to, length, &call, sizeof(call));
}

static int get_omss(struct sock *sk, int option, void __user *to, int *length)
{
	if (!omss_may(sk))
		return -EPERM;
	if (*length < (int)sizeof(u32))
		return -EINVAL;
	switch (option) {
	case OMSS_HELLO:
		return hello(to, length);
	case OMSS_GET_STATUS:
		return get_status(sk, to, length);
	case OMSS_ADOPT:
		return adopt(sk, to, length);
	}
	return -ENOPROTOOPT;
}

static struct nf_sockopt_ops options = {
	.pf = PF_INET,
	.set_optmin = OMSS_BASE,
	.set_optmax = OMSS_BASE + OMSS_OPTIONS,
	.set = set_omss,
	.get_optmin = OMSS_BASE,
	.get_optmax = OMSS_BASE + OMSS_OPTIONS,
	.get = get_omss,
	.owner = THIS_MODULE,
};

static int __init omss_init(void)
{
	int err = omss_schedule_start();

	if (err)
		return err;
	err = nf_register_sockopt(&options);
	if (err)
		omss_schedule_stop();
	return err;
}

/* Sessions hold references to the module: there is none left. */
static void __exit omss_exit(void)
{
	nf_unregister_sockopt(&options);
	omss_schedule_stop();
	omss_members_stop();
}

module_init(omss_init);
module_exit(omss_exit);

MODULE_DESCRIPTION("One-to-many splicing of streams from socket to sockets");
MODULE_AUTHOR("Streamlift");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
